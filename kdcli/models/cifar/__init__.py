"""The zoo's CIFAR networks. Importing this registers them with timm under `cifar_*`.

`timm.create_model("cifar_resnet20", num_classes=100)` then works; `translate` renames public checkpoints' tensors.
"""

from kdcli.models.cifar import mobilenetv2, resnet, shufflenet, vgg, wrn
from kdcli.models.cifar.base import CifarNet
from kdcli.models.cifar.public_names import translate

__all__ = ["CifarNet", "mobilenetv2", "resnet", "shufflenet", "translate", "vgg", "wrn"]
