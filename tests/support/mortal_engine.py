"""An engine that dies: ``PROGRAM`` is a zygote that forks such engines.

The scheduler is the real one, and tokens are a function of prompt and seed (``token_runner.expected_tokens``). What happens to
an engine stands in the prompts of its requests: with ``POISON`` it dies when the request's row is launched, with
``LATE_POISON`` when its fifth token comes, and with ``HANG`` it hangs for ever the first time and never again (a file
remembers it).
"""

import os
import signal
import sys
import time
from pathlib import Path

from minivllm.config import Config
from minivllm.engine.process import Steps
from minivllm.errors import BrokenModelFolder

POISON, LATE_POISON, HANG = 13, 14, 15
VOCABULARY = 97
STEP_S = 0.002
PROGRAM = ("-c", f"import sys; sys.path.insert(1, {str(Path(__file__).parent)!r}); import mortal_engine; mortal_engine.main()")


def build(config: Config) -> Steps:
    """See above; ``download_dir`` is where hangs are remembered."""
    from fake_engine import fake_engine

    if config.server.port == 1:
        raise BrokenModelFolder("The folder is broken; mend it.")
    engine = fake_engine(VOCABULARY, num_blocks=config.cache.num_gpu_blocks_override or 257)
    runner = engine._executor
    launch = runner.launch
    poisoned: dict[int, int] = {}  # uid -> known tokens at which it kills

    def deadly(plan):  # type: ignore[no-untyped-def]
        for new in plan.new_rows:
            if POISON in new.token_ids[: new.num_prompt]:
                os.kill(os.getpid(), signal.SIGKILL)
            if LATE_POISON in new.token_ids[: new.num_prompt]:
                poisoned[new.row] = new.num_prompt + 5 - len(new.token_ids)
            if HANG in new.token_ids[: new.num_prompt]:
                mark = Path(config.model.download_dir or "") / "hung"
                if not mark.exists():
                    mark.touch()
                    time.sleep(3600)
        for work in plan.work:
            if work.row in poisoned:
                if poisoned[work.row] <= 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                poisoned[work.row] -= 1
        time.sleep(STEP_S)
        return launch(plan)

    runner.launch = deadly  # type: ignore[method-assign]
    return engine


def main() -> None:
    from minivllm.engine.zygote import serve_steps

    code = serve_steps(int(sys.argv[-1]), build)
    sys.stdout.flush()
    os._exit(code)
