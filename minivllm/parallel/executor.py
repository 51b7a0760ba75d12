"""Where runners live. One in this process now; one process per device later, each given the same plan."""

from minivllm.runner.runner import AnyPending, AnyRunner
from minivllm.types import StepPlan


class LocalExecutor:
    """One runner in this process. Driven by the engine's thread."""

    def __init__(self, runner: AnyRunner) -> None:
        self.runner = runner

    def launch(self, plan: StepPlan) -> AnyPending:
        """Start a step; raises ``runner.rows.PlanError``."""
        return self.runner.launch(plan)

    def prepare_more(self) -> bool:
        """Let the runner use the time while nothing else is to be done. False: it has no use for it."""
        return self.runner.prepare_more()
