"""kdcli: compress image models by knowledge distillation and ship the result."""

__version__ = "0.1.0"
