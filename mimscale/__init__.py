"""mimscale: masked-image-modeling pre-training at scale."""

__version__ = "0.1.0"
