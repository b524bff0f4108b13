"""The networks. Importing this package registers them with timm."""
from .plain_cnn import PlainCNN
from .residual_attention import ResidualAttentionNet

__all__ = ["PlainCNN", "ResidualAttentionNet"]
