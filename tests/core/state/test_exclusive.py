"""A held folder is let go by the process that took it, and by no fork of it."""

import contextlib
import os
import sys

import pytest

from compression_manager.state.files import exclusive


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_fork_that_leaves_the_block_changes_nothing(tmp_path):
    folder = tmp_path / "new"
    with contextlib.ExitStack() as held:
        held.enter_context(exclusive(folder))
        child = os.fork()
        if not child:
            try:
                held.close()
            finally:
                os._exit(int(not folder.is_dir()))
        assert os.waitpid(child, 0)[1] == 0
        assert folder.is_dir()
        with pytest.raises(BlockingIOError), exclusive(folder):
            pass
    assert not folder.exists()
