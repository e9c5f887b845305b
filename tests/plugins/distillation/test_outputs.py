"""Where the logits are found in what a model returns."""

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from compression_manager import ConfigError
from compression_plugins.distillation.outputs import pick_logits

LOGITS = torch.arange(6.0).reshape(2, 3)
OTHER = torch.zeros(2, 3)
SCALAR = torch.tensor(1.0)


class ModelOutput(OrderedDict):
    """A mapping whose entries are also attributes."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


@dataclass
class ObjectOutput:
    logits: Tensor
    hidden: Tensor


class SlotOutput:
    __slots__ = ("logits",)

    def __init__(self, logits):
        self.logits = logits


LogitsLast = namedtuple("LogitsLast", ["loss", "logits"])
Pair = namedtuple("Pair", ["scores", "features"])


def pick(output, key=None):
    return pick_logits(output, key, where="student", option="output")


@pytest.mark.parametrize(
    ("output", "key"),
    [
        (LOGITS, None),
        ((LOGITS, OTHER), None),
        ([LOGITS, OTHER], None),
        ((OTHER, LOGITS), 1),
        ((OTHER, LOGITS), -1),
        ([SCALAR, LOGITS], 1),
        ({"loss": SCALAR, "logits": LOGITS}, None),
        ({"main": LOGITS, "logits": OTHER}, "main"),
        ({0: LOGITS, 1: OTHER}, 0),
        (UserDict(logits=LOGITS), None),
        (ModelOutput(loss=SCALAR, logits=LOGITS), None),
        (ModelOutput(loss=SCALAR, start=LOGITS), "start"),
        (ObjectOutput(LOGITS, OTHER), None),
        (ObjectOutput(OTHER, LOGITS), "hidden"),
        (SlotOutput(LOGITS), None),
        (LogitsLast(SCALAR, LOGITS), None),
        (Pair(LOGITS, OTHER), None),
        (Pair(OTHER, LOGITS), "features"),
        (Pair(OTHER, LOGITS), 1),
    ],
)
def test_finds_the_logits(output, key):
    assert pick(output, key) is LOGITS


@pytest.mark.parametrize(
    ("output", "key", "message"),
    [
        (SCALAR, None, r"got a tensor of shape \(\)"),
        ((SCALAR, LOGITS), None, r"got a tensor of shape \(\).*DistillationConfig\(output=\.\.\."),
        ((LOGITS.argmax(-1), LOGITS), None, r"shape \(2,\) and dtype torch.int64; choose another"),
        ((None, LOGITS), None, "got NoneType"),
        (("text", LOGITS), None, "got str"),
        ((LOGITS,), 1, r"returned 1 elements; output=1 is out of range"),
        ((LOGITS,), -2, "output=-2 is out of range"),
        ((), None, r"returned 0 elements"),
        ((LOGITS,), "logits", r"returned tuple, which holds no 'logits'"),
        (LOGITS, 0, "returned a tensor, which needs no output=0"),
        (LOGITS, "T", "returned a tensor, which needs no output='T'"),
        ({"logit": LOGITS}, None, r"holds no 'logits'.*did you mean 'logit'\? Valid: logit\."),
        ({"scores": LOGITS}, "keys", r"holds no 'keys'.*Valid: scores"),
        (ModelOutput(logits=LOGITS), "logit", r"holds no 'logit'.*did you mean 'logits'"),
        (ModelOutput(logits=LOGITS), 0, r"holds no 0.*Valid: logits"),
        (ObjectOutput(LOGITS, OTHER), "logit", r"holds no 'logit'.*Valid: hidden, logits"),
        (Pair(LOGITS, OTHER), "score", r"holds no 'score'.*did you mean 'scores'"),
        (None, None, "returned NoneType, which holds no 'logits'"),
        (3.0, None, "returned float, which holds no 'logits'"),
    ],
)
def test_says_what_is_wrong_and_what_is_valid(output, key, message):
    with pytest.raises(ConfigError, match=message) as caught:
        pick(output, key)
    assert "the student" in str(caught.value)


def test_message_names_the_teacher_and_its_option():
    with pytest.raises(ConfigError, match=r"the teacher.*DistillationConfig\(teacher_output="):
        pick_logits({}, None, where="teacher", option="teacher_output")
