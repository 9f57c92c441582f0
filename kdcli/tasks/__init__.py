"""What a student is asked to do: hard loss, soft loss, mark and metrics of a task."""

from kdcli.tasks.classify import Classify

__all__ = ["Classify"]
