"""The Vision Transformer that sees a noisy image and its noise level, and the classifier on it.

Shapes: B batch, C image channels, H = W image size, P patches, T = 2 + P tokens, D width,
K classes.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from rrcm import noise

HeadInput = Literal["prenorm", "norm"]


def sinusoidal_embedding(values: Tensor, width: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoidal embedding [B, width] of values [B]: cosines first, then sines (DDPM).

    Raises:
        ValueError: width is odd.
    """
    if width % 2:
        raise ValueError(f"sinusoidal_embedding: width must be even, got {width}")
    half = width // 2
    frequencies = torch.exp(
        -math.log(max_period) * torch.arange(half, device=values.device, dtype=torch.float32) / half
    )
    angles = values.float()[:, None] * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class LayerNorm(nn.LayerNorm):
    """LayerNorm whose arithmetic is float32 whatever the dtype around it."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            normed = F.layer_norm(
                input.float(),
                self.normalized_shape,
                self.weight.float(),
                self.bias.float(),
                self.eps,
            )
        return normed.to(input.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention of [B, heads, tokens, dim] tensors."""
    if q.device.type == "cpu":
        # torch's fused CPU kernel is 5 to 10 times slower backward in bfloat16 (18 to 198 tokens).
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        weights: Tensor = scores.float().softmax(-1).to(v.dtype)
        return weights @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head self-attention; qkv without bias, projection with."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, first_only: bool = False) -> Tensor:
        batch, tokens, width = x.shape
        if first_only:
            w_q, w_kv = self.qkv.weight[:width], self.qkv.weight[width:]
            q = F.linear(x[:, :1], w_q).view(batch, 1, self.heads, -1).transpose(1, 2)
            kv = F.linear(x, w_kv).view(batch, tokens, 2, self.heads, -1)
            k, v = kv.permute(2, 0, 3, 1, 4)
        else:
            qkv = self.qkv(x).view(batch, tokens, 3, self.heads, -1)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = attend(q, k, v).transpose(1, 2).reshape(batch, -1, width)
        return self.proj(mixed)  # type: ignore[no-any-return]


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.norm1 = LayerNorm(width, eps=1e-5)
        self.attn = Attention(width, heads)
        self.norm2 = LayerNorm(width, eps=1e-5)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor, first_only: bool = False) -> Tensor:
        """All tokens [B, T, D] of x [B, T, D], or just the first one, [B, 1, D], for less work."""
        mixed = self.attn(self.norm1(x), first_only)
        x = (x[:, :1] if first_only else x) + mixed
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class Encoder(nn.Module, PyTorchModelHubMixin, library_name="rrcm"):
    """ViT with a time token, and the projector that pre-training uses (METHOD: rRCM, Section 4).

    Tokens in order: class, time, patches. The time token is the sinusoidal embedding of
    `250 ln t`; the image is scaled by `c_in(t)` (both from `rrcm.noise`).

    Args:
        image_size: height and width of the images, in pixels; a multiple of patch_size.
        patch_size: side of a patch, in pixels.
        in_channels: 1 for grey images, 3 for RGB.
        width: features a token; even, and a multiple of heads.
        depth: number of blocks, at least 1.
        heads: attention heads.
        mlp_ratio: hidden width of a block's MLP, in widths.
        projector_hidden: hidden width of the projector.
        projector_dim: output width of the projector.
        init: "vit" (truncated normal 0.02) or "moco-v3" (Xavier-uniform, q, k and v apart).
        freeze_patch_embed: keep the patch embedding at its random initial value (MoCo-v3).

    Raises:
        ValueError: sizes that do not divide as said above, or an unknown init.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        in_channels: int = 3,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        projector_hidden: int,
        projector_dim: int = 256,
        init: Literal["vit", "moco-v3"] = "vit",
        freeze_patch_embed: bool = False,
    ) -> None:
        super().__init__()
        sizes = (image_size, patch_size, in_channels, width, depth, heads, projector_hidden)
        if min(sizes) < 1 or projector_dim < 1 or int(width * mlp_ratio) < 1:
            raise ValueError(f"encoder: sizes must be at least 1, got {sizes}")
        if image_size % patch_size:
            raise ValueError(
                f"encoder: image_size {image_size} is not a multiple of patch_size {patch_size}"
            )
        if width % 2 or width % heads:
            raise ValueError(f"encoder: width {width} must be even and a multiple of heads {heads}")
        if init not in ("vit", "moco-v3"):
            raise ValueError(f"encoder: init must be 'vit' or 'moco-v3', got {init!r}")
        self.image_size = image_size
        self.in_channels = in_channels
        self.width = width
        self.config = {
            "image_size": image_size,
            "patch_size": patch_size,
            "in_channels": in_channels,
            "width": width,
            "depth": depth,
            "heads": heads,
            "mlp_ratio": mlp_ratio,
            "projector_hidden": projector_hidden,
            "projector_dim": projector_dim,
            "init": init,
            "freeze_patch_embed": freeze_patch_embed,
        }

        patches = (image_size // patch_size) ** 2
        self.patch_embed = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 2 + patches, width))
        self.blocks = nn.ModuleList([Block(width, heads, mlp_ratio) for _ in range(depth)])
        self.norm = LayerNorm(width, eps=1e-5)
        self.projector = nn.Sequential(
            nn.Linear(width, projector_hidden, bias=False),
            nn.BatchNorm1d(projector_hidden),
            nn.ReLU(inplace=True),
            nn.Linear(projector_hidden, projector_hidden, bias=False),
            nn.BatchNorm1d(projector_hidden),
            nn.ReLU(inplace=True),
            nn.Linear(projector_hidden, projector_dim, bias=False),
        )

        nn.init.normal_(self.cls_token, std=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if init == "moco-v3":
            init_moco_v3(self)
        else:
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    nn.init.trunc_normal_(module.weight, std=0.02)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
        if freeze_patch_embed:
            self.patch_embed.requires_grad_(False)

    def class_token(self, x: Tensor, t: Tensor) -> Tensor:
        """The class token before the final LayerNorm, [B, D], of x [B, C, H, W] at levels t [B].

        Args:
            x: images in [-1, 1] plus noise of level t.
            t: noise levels on the [-1, 1] scale, > 0.

        Raises:
            ValueError: x or t of a shape this encoder does not take.
        """
        batch = x.shape[0]
        expected = (batch, self.in_channels, self.image_size, self.image_size)
        if x.shape != expected or t.shape != (batch,):
            raise ValueError(
                f"encoder: takes x {list(expected)} and t [{batch}], "
                f"got x {list(x.shape)} and t {list(t.shape)}"
            )
        patches = self.patch_embed(x * noise.input_scale(t)[:, None, None, None])
        time = sinusoidal_embedding(noise.time_value(t), self.width)
        tokens = torch.cat(
            [
                self.cls_token.expand(batch, -1, -1),
                time[:, None],
                patches.flatten(2).transpose(1, 2),
            ],
            dim=1,
        )
        tokens = tokens + self.pos_embed
        for block in self.blocks[:-1]:
            tokens = block(tokens)
        # Only the class token is read, so the last block computes no other.
        return self.blocks[-1](tokens, first_only=True)[:, 0]  # type: ignore[no-any-return]

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Features [B, D]: the final LayerNorm of the class token. Arguments as `class_token`."""
        return self.norm(self.class_token(x, t))  # type: ignore[no-any-return]

    def project(self, features: Tensor) -> Tensor:
        """Projections [B, projector_dim] of features [B, D]; BatchNorm sees this batch alone."""
        return self.projector(features)  # type: ignore[no-any-return]


def init_moco_v3(encoder: Encoder) -> None:
    """MoCo-v3's initial values: Xavier-uniform, with q, k and v treated as separate matrices.

    Source: Chen et al. 2021 (arXiv 2104.02057) and its public code, as rRCM's ImageNet runs use.
    """
    for name, module in encoder.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if name.endswith("qkv"):
            width = module.in_features
            bound = math.sqrt(6.0 / (width + width))
            nn.init.uniform_(module.weight, -bound, bound)
        else:
            nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    conv = encoder.patch_embed
    fan_in = conv.in_channels * conv.kernel_size[0] * conv.kernel_size[1]
    bound = math.sqrt(6.0 / (fan_in + encoder.width))
    nn.init.uniform_(conv.weight, -bound, bound)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


class Classifier(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="rrcm",
    coders={Encoder: (lambda encoder: encoder.config, lambda config: Encoder(**config))},
):
    """A linear head on an Encoder, for images under Gaussian noise of one sigma.

    The normalisation to [-1, 1] is inside, so noise is always in [0, 1] pixel units, and the time
    value is that of the grid level nearest to `2 * sigma` (rRCM's fine-tuning and certification).

    Args:
        encoder: the encoder; its projector is not used.
        num_classes: K, at least 2.
        sigma: noise level on the [0, 1] scale, > 0.
        head_input: "norm" reads the final LayerNorm of the class token (ImageNet), "prenorm" the
            class token before it (CIFAR-10).
        class_names: K names for people to read, or None.

    Raises:
        ValueError: sigma <= 0, num_classes < 2, or a wrong number of class names.
    """

    def __init__(
        self,
        encoder: Encoder,
        num_classes: int,
        sigma: float,
        head_input: HeadInput = "norm",
        class_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        if not (sigma > 0 and math.isfinite(sigma)):
            raise ValueError(f"classifier: sigma must be a positive number, got {sigma}")
        if num_classes < 2:
            raise ValueError(f"classifier: num_classes must be at least 2, got {num_classes}")
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(
                f"classifier: {len(class_names)} class names for {num_classes} classes"
            )
        if head_input not in ("norm", "prenorm"):
            raise ValueError(
                f"classifier: head_input must be 'norm' or 'prenorm', got {head_input!r}"
            )
        self.encoder = encoder
        self.head = nn.Linear(encoder.width, num_classes)
        self.num_classes = num_classes
        self.sigma = sigma
        self.head_input = head_input
        self.class_names = tuple(class_names) if class_names is not None else None
        self.level = noise.nearest_level(noise.level_for_sigma(sigma))
        # Near zero, as rRCM's code has it: the first predictions are uniform.
        nn.init.normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, K] of x [B, C, H, W] in [0, 1] plus noise of standard deviation sigma."""
        return self.logits(2.0 * x - 1.0, self.level)

    def logits(self, x: Tensor, level: float) -> Tensor:
        """Logits [B, K] of x [B, C, H, W] in [-1, 1] plus noise, read at the given noise level."""
        return self.head(self.head_features(x, level))  # type: ignore[no-any-return]

    def head_features(self, x: Tensor, level: float) -> Tensor:
        """What the head reads, [B, D]; arguments as `logits`."""
        token = self.encoder.class_token(x, x.new_full((x.shape[0],), level))
        return self.encoder.norm(token) if self.head_input == "norm" else token
