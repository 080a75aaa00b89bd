"""The sizes of the smallest CLIP that the tests train."""

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
