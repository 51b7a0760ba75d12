"""Who runs in a step: queues, budgets, preemption. Pure Python; time is passed in, no tensor is ever seen."""
