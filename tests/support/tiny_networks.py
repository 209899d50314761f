"""One tiny network a family and its strides."""

HIERARCHICAL = (4, 8, 16, 32)
FAMILIES = {
    "resnet10t": HIERARCHICAL,
    "res2net50_26w_4s": HIERARCHICAL,
    "resnest14d": HIERARCHICAL,
    "skresnet18": HIERARCHICAL,
    "regnetx_002": HIERARCHICAL,
    "tf_efficientnet_lite0": HIERARCHICAL,
    "mobilenetv3_small_050": HIERARCHICAL,
    "convnext_atto": HIERARCHICAL,
    "convnextv2_atto": HIERARCHICAL,
    "poolformer_s12": HIERARCHICAL,
    "pvt_v2_b0": HIERARCHICAL,
    "swin_tiny_patch4_window7_224": HIERARCHICAL,
    "swinv2_tiny_window8_256": HIERARCHICAL,
    "vit_tiny_patch16_224": (16,) * 4,
    "deit_tiny_distilled_patch16_224": (16,) * 4,
    "eva02_tiny_patch14_224": (14,) * 4,
    "vit_tiny_patch16_dinov3_qkvb": (16,) * 4,
}
