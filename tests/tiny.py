"""The smallest CLIP that the tests train."""

from fast_goal.config import ScratchConfig

# the sizes among the fields of ScratchConfig
CLIP = {
    "image_size": 32,
    "patch_size": 8,
    "embed_dim": 16,
    "vision_width": 16,
    "vision_layers": 1,
    "text_width": 16,
    "text_layers": 1,
    "head_width": 8,
}


def scratch_config(**changes) -> ScratchConfig:
    """A base that is trained from scratch in a moment."""
    values = {
        "split": "pretrain",
        **CLIP,
        "vision_layers": 2,
        "steps": 20,
        "batch_size": 4,
        "learning_rate": 5e-3,
        "weight_decay": 0.1,
        "warmup_steps": 2,
    }
    return ScratchConfig(**(values | changes))
