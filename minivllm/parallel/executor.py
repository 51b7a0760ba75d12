"""Where runners live. One in this process now; one process per device later, each given the same plan."""

from minivllm.runner.runner import Pending, Runner
from minivllm.types import StepPlan


class LocalExecutor:
    """One runner in this process. Driven by the engine's thread."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner

    def launch(self, plan: StepPlan) -> Pending:
        """Start a step; raises ``runner.rows.PlanError``."""
        return self.runner.launch(plan)
