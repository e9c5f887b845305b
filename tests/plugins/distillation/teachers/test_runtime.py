"""How a live teacher runs: what it answers, and that the user's model stays as it is."""

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import toys
from compression_manager import ConfigError
from compression_plugins import EnsembleTeacher, QuantizedTeacher, TeacherRuntime
from compression_plugins.distillation.teachers.distortion import measure_distortion
from compression_plugins.distillation.teachers.runtime import RunningTeacher, running_teacher
from compression_plugins.distillation.teachers.teacher import Teacher, weights_hash
from toy_teachers import CountingTeacher, condition

COPIES = [
    TeacherRuntime("bfloat16"),
    TeacherRuntime("int8"),
    TeacherRuntime(channels_last=True),
    TeacherRuntime("bfloat16", channels_last=True),
    TeacherRuntime("int8", channels_last=True),
]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def trained(model):
    """BatchNorm statistics of some data, then eval mode."""
    with torch.no_grad():
        for _ in range(5):
            model(torch.randn(16, 1, 8, 8) + 0.5)
    return model.eval().requires_grad_(False)


def size_in_bytes(model):
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def transformer():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)).eval()


class Tied(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.norm(self.embedding(tokens)))


def test_the_defaults_run_the_model_itself():
    model = toys.mlp()
    assert running_teacher(model, TeacherRuntime()) is model


@pytest.mark.parametrize("runtime", COPIES, ids=str)
def test_logits_are_close_to_the_models_and_float32(runtime):
    model, inputs = trained(toys.ConvNet(8)), torch.randn(64, 1, 8, 8)
    expected = model(inputs)
    output = running_teacher(model, runtime)(inputs)
    assert output.dtype == torch.float32
    distortion = measure_distortion(expected, output.detach())
    if runtime == TeacherRuntime(channels_last=True):
        torch.testing.assert_close(output, expected)
    else:
        assert 0 < distortion.kl < 1e-4


@pytest.mark.parametrize("runtime", COPIES, ids=str)
def test_the_users_model_stays_as_it_is(runtime):
    model, inputs = toys.ConvNet(8, dropout=0.5), torch.randn(2, 1, 8, 8)
    before, modes, digest = (
        copy.deepcopy(model.state_dict()),
        condition(model),
        weights_hash(model),
    )
    tensors = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    running = Teacher(running_teacher(model, runtime))
    running.run(inputs)
    toys.assert_identical(model.state_dict(), before)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == tensors
    assert model.conv2.weight.is_contiguous()
    assert condition(model) == modes
    assert weights_hash(model) == digest


def test_dropout_is_off_in_the_copy_whatever_the_models_mode_is():
    model, inputs = toys.ConvNet(8, dropout=0.5).train(), torch.randn(16, 1, 8, 8)
    for runtime in COPIES:
        running = running_teacher(model, runtime)
        assert torch.equal(running(inputs), running(inputs)), runtime


def test_bfloat16_halves_the_memory_and_int8_quarters_it():
    model = toys.mlp(512, 512)
    for precision, share in (("bfloat16", 0.5), ("int8", 0.26)):
        running = running_teacher(model, TeacherRuntime(precision))
        assert size_in_bytes(running) / size_in_bytes(model) == pytest.approx(share, rel=0.02)


def test_bfloat16_is_a_product_of_rounded_factors():
    model, inputs = nn.Linear(16, 4), torch.randn(8, 16)
    output = running_teacher(model, TeacherRuntime("bfloat16"))(inputs).double()

    def rounded(tensor):
        return tensor.detach().bfloat16().double()

    exact = rounded(inputs) @ rounded(model.weight).T + rounded(model.bias)
    # One rounding of the result: half a unit in the last of 8 places.
    torch.testing.assert_close(output, exact, rtol=2**-8, atol=1e-6)
    assert not torch.equal(output.float(), model(inputs))


def test_int8_is_that_of_the_quantized_teacher():
    model, inputs = toys.mlp(32), torch.randn(8, 6)
    output = running_teacher(model, TeacherRuntime("int8"))(inputs)
    assert torch.equal(output, QuantizedTeacher(model, weights=True).model(inputs))


def test_channels_last_reaches_weights_and_images():
    seen = []
    # With one channel both formats are the same.
    running = running_teacher(nn.Conv2d(3, 4, 3), TeacherRuntime(channels_last=True))
    running.model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    output = running(torch.randn(2, 3, 8, 8))
    for tensor in (running.model.weight, seen[0], output):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
        assert not tensor.is_contiguous()


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_transformers_and_tied_weights_run(precision):
    runtime = TeacherRuntime(precision)
    for model, inputs in (
        (transformer(), torch.randn(3, 5, 16)),
        (Tied().eval(), torch.arange(10).reshape(2, 5)),
    ):
        output = running_teacher(model, runtime)(inputs)
        assert measure_distortion(model(inputs), output).kl < 1e-3


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
@pytest.mark.parametrize("wrap", [EnsembleTeacher, QuantizedTeacher])
def test_other_teachers_run(wrap, precision):
    model, inputs = toys.mlp(32), torch.randn(8, 6)
    teacher = EnsembleTeacher([model]) if wrap is EnsembleTeacher else wrap(model, scale=0.01)
    output = running_teacher(teacher, TeacherRuntime(precision))(inputs)
    assert 0 < measure_distortion(teacher(inputs), output).kl < 1e-3


def test_outputs_of_every_kind_come_back_in_float32():
    for wrap, pick in (
        (lambda logits: (logits, 1), lambda output: output[0]),
        (lambda logits: {"logits": logits}, lambda output: output["logits"]),
    ):
        teacher = CountingTeacher(toys.mlp(), wrap)
        running = Teacher(running_teacher(teacher, TeacherRuntime("bfloat16")))
        output = running.run({"x": torch.randn(2, 6), "labels": torch.zeros(2)})
        assert pick(output).dtype == torch.float32
        assert type(output) is type(wrap(torch.zeros(1)))
    # An object stays as it is; the losses compute in float32.
    teacher = CountingTeacher(toys.mlp(), lambda logits: SimpleNamespace(logits=logits))
    running = running_teacher(teacher, TeacherRuntime("bfloat16"))
    assert running(torch.randn(2, 6)).logits.dtype == torch.bfloat16


def test_an_error_of_the_model_tells_how_it_ran():
    class Viewing(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, input):
            hidden = self.conv(input)
            return hidden.view(len(hidden), -1)

    running = running_teacher(Viewing(), TeacherRuntime(channels_last=True))
    with pytest.raises(RuntimeError, match="view") as error:
        running(torch.randn(2, 3, 8, 8))
    assert "channels_last=True" in error.value.__notes__[0]


# Compilation --------------------------------------------------------------------------------------


def eager_backend(graph, example_inputs):
    eager_backend.graphs += 1
    return graph.forward


def compiling(model, backend, **options):
    return RunningTeacher(model.eval(), TeacherRuntime(compile=True, **options), backend=backend)


def test_compiles_once_with_a_message_and_leaves_the_model_alone(capsys):
    eager_backend.graphs = 0
    model, inputs = toys.mlp().eval(), torch.randn(4, 6)
    before = dict(vars(model))
    running = compiling(model, eager_backend)
    assert capsys.readouterr().err == ""
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(running(inputs), model(inputs))
    assert eager_backend.graphs == 1
    assert capsys.readouterr().err.count("compiling") == 1
    assert dict(vars(model)) == before
    assert list(running.state_dict()) == [f"model.{name}" for name in model.state_dict()]


def test_compiles_every_precision():
    model, inputs = trained(toys.ConvNet(8)), torch.randn(4, 1, 8, 8)
    for precision in ("bfloat16", "int8"):
        eager_backend.graphs = 0
        plain = running_teacher(model, TeacherRuntime(precision, channels_last=True))
        compiled = compiling(plain.model, eager_backend, precision=precision, channels_last=True)
        with torch.no_grad():
            torch.testing.assert_close(compiled(inputs), plain(inputs))
        assert eager_backend.graphs == 1, precision


def test_a_failing_compiler_is_one_warning_and_the_plain_teacher(capsys):
    def failing(graph, example_inputs):
        raise RuntimeError("no compiler here")

    model, inputs = toys.mlp(), torch.randn(4, 6)
    running = compiling(model, failing)
    with pytest.warns(UserWarning, match=r"without torch.compile, which failed.*no compiler here"):
        assert torch.equal(running(inputs), model(inputs))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(running(inputs), model(inputs))


def test_an_error_of_the_model_is_not_the_compilers():
    running = compiling(toys.mlp(), eager_backend)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        running(torch.randn(4, 5))
    eager_backend.graphs = 0
    running(torch.randn(4, 6))
    assert eager_backend.graphs == 1


def test_a_copy_of_a_compiled_teacher_runs_its_own_weights():
    running, inputs = compiling(toys.mlp(), eager_backend), torch.randn(4, 6)
    running(inputs)
    other = copy.deepcopy(running)
    with torch.no_grad():
        other.model[2].bias.add_(1)
    torch.testing.assert_close(other(inputs), running(inputs) + 1)


@pytest.mark.slow
def test_inductor_compiles():
    model, inputs = trained(toys.ConvNet(8)), torch.randn(4, 1, 8, 8)
    running = running_teacher(model, TeacherRuntime(compile=True))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("error", message="TeacherRuntime")
        warnings.filterwarnings("default", category=DeprecationWarning)
        torch.testing.assert_close(running(inputs), model(inputs))


# Options ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "bf16"}, r"TeacherRuntime.precision got 'bf16'.*'?bfloat16"),
        ({"precision": 8}, "TeacherRuntime.precision got 8"),
        ({"compile": 1}, "TeacherRuntime.compile must be of type bool, got 1"),
        ({"channels_last": "yes"}, "TeacherRuntime.channels_last must be of type bool"),
    ],
)
def test_invalid_options_are_an_error(options, message):
    with pytest.raises(ConfigError, match=message):
        TeacherRuntime(**options)
