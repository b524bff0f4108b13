"""The networks. Importing this package registers them with timm."""
from .plain_cnn import PlainCNN
from .residual_attention import ResidualAttentionNet
from .resnet_cifar import ResNetCifar

__all__ = ["PlainCNN", "ResNetCifar", "ResidualAttentionNet"]
