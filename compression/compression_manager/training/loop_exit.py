"""How a `for` loop over a generator was left: by its body's exception, or in order.

Python tells a suspended generator that it is dropped (GeneratorExit), but not why. The frame of
the loop does: when its body raised, a traceback object points at the instruction at which the
frame stands.
"""

from __future__ import annotations

import dis
import gc
import inspect
from types import FrameType, TracebackType

# The instructions with which CPython drops a loop's iterator after break and return.
_ORDERLY = frozenset({"POP_TOP", "POP_ITER", "END_FOR"})
# They pass an exception on that was recorded at another instruction.
_RAISING = frozenset({"RAISE_VARARGS", "RERAISE"})
_SUSPENDED = frozenset({"YIELD_VALUE", "RESUME"})


def left_by_exception(frame: FrameType | None) -> bool:
    """Return whether the loop that drops a generator does so because its body raised.

    Args:
        frame: the frame that drops the generator: `sys._getframe().f_back` in the generator,
            while it handles GeneratorExit.
    """
    while frame is not None:
        instruction = _present_instruction(frame)
        # A generator around ours (tqdm, for example) stands at its yield if it is dropped itself.
        is_generator = bool(frame.f_code.co_flags & inspect.CO_GENERATOR)
        if not (is_generator and instruction in _SUSPENDED):
            if instruction in _ORDERLY:
                return False
            return instruction in _RAISING or _has_traceback(frame)
        frame = frame.f_back
    return False


def _present_instruction(frame: FrameType) -> str | None:
    instructions = dis.get_instructions(frame.f_code)
    return next((item.opname for item in instructions if item.offset == frame.f_lasti), None)


def _has_traceback(frame: FrameType) -> bool:
    return any(
        isinstance(item, TracebackType)
        and item.tb_frame is frame
        and item.tb_lasti == frame.f_lasti
        for item in gc.get_referrers(frame)
    )
