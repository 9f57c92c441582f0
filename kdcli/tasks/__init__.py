"""What a student is trained for: losses, mark and metrics. A new task is a class of its own and one line here."""

from kdcli.tasks.base import Metric, Score, Task
from kdcli.tasks.classify import Classify
from kdcli.tasks.multilabel import MultiLabel

TASKS: dict[str, type[Task]] = {task.name: task for task in (Classify, MultiLabel)}
"""Every task by the recipe's word."""

__all__ = ["TASKS", "Classify", "Metric", "MultiLabel", "Score", "Task"]
