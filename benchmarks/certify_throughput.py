"""How fast certification draws noisy samples: a plain loop against rrcm.smoothing's engine.

Everything is measured in one run on the same weights, in turns, several times; the medians are
printed and written as JSON. "yardstick" is Cohen's loop as published, written out below: float32,
repeat, randn_like, argmax, counting in Python. "bare" is a forward pass of a ready batch with no
noise and no counting. "share" is the arithmetic done in a second over that of the machine's best
matrix product in the same dtype.

    python benchmarks/certify_throughput.py --out benchmarks/results/certify_throughput_cpu.json
    python benchmarks/certify_throughput.py --models vit-b4 --seconds 4
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rrcm import Classifier, Encoder
from rrcm.smoothing import SmoothedClassifier

SIGMA = 0.5


def vit(image_size: int, patch_size: int, width: int, depth: int, heads: int) -> nn.Module:
    encoder = Encoder(
        image_size=image_size,
        patch_size=patch_size,
        width=width,
        depth=depth,
        heads=heads,
        projector_hidden=8,
        projector_dim=8,
    )
    return Classifier(encoder, 1000 if image_size == 224 else 10, SIGMA)


class Residual(nn.Module):
    """Two 3x3 convolutions with a shortcut (He et al. 2016)."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width_in, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        same = stride == 1 and width_in == width
        self.shortcut = nn.Identity() if same else nn.Conv2d(width_in, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.shortcut(x) + self.body(x))


def resnet18() -> nn.Module:
    """ResNet-18 for 32x32 images."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    width = 64
    for wider, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [Residual(width, wider, stride), Residual(wider, wider, 1)]
        width = wider
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


MODELS: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    "vit-b4": (32, lambda: vit(32, 4, 768, 12, 12)),
    "vit-s4": (32, lambda: vit(32, 4, 512, 6, 8)),
    "vit-b16": (224, lambda: vit(224, 16, 768, 12, 12)),
    "resnet18": (32, resnet18),
}


def yardstick(model: nn.Module, x: Tensor, num: int, batch_size: int, num_classes: int) -> None:
    """SampleUnderNoise as locuslab/smoothing states it: one image, float32, counts in Python."""
    counts = [0] * num_classes
    with torch.no_grad():
        while num > 0:
            size = min(batch_size, num)
            num -= size
            batch = x.repeat((size, 1, 1, 1))
            noise = torch.randn_like(batch) * SIGMA
            for prediction in model(batch + noise).argmax(1).cpu().tolist():
                counts[prediction] += 1


def rate(work: Callable[[int], None], samples: int, device: torch.device) -> float:
    """Samples a second of one run."""
    started = time.perf_counter()
    work(samples)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return samples / (time.perf_counter() - started)


def matmul_ceiling(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the best of some square matrix products."""
    sizes = (1024, 2048, 4096) if device.type == "cpu" else (4096, 8192)
    best = 0.0
    for size in sizes:
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        for _ in range(5):
            started = time.perf_counter()
            (a @ b).sum().item()
            best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def flops_a_sample(model: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x[None])
    return int(counter.get_total_flops())


def measure(
    name: str,
    device: torch.device,
    seconds: float,
    repeats: int,
    compile: bool,
    yardstick_batch: int,
) -> dict:
    image_size, make = MODELS[name]
    torch.manual_seed(0)
    model = make().to(device).eval()
    x = torch.rand(3, image_size, image_size, device=device)
    num_classes = model(x[None]).shape[1]
    flops = flops_a_sample(model, x)

    variants: dict[str, Callable[[int], None]] = {
        "yardstick": lambda num: yardstick(model, x, num, yardstick_batch, num_classes)
    }
    batch_sizes = {}

    def ours(dtype: torch.dtype, compiled: bool = False) -> Callable[[int], None]:
        smoothed = SmoothedClassifier(model, SIGMA, num_classes, dtype=dtype, compile=compiled)
        smoothed.certify(x, 1, 1)  # finds the batch size, compiles
        batch_sizes[str(dtype).removeprefix("torch.")] = smoothed.batch_size
        return lambda num: smoothed.certify(x, 1, num - 1) and None

    def bare(dtype: torch.dtype, batch_size: int) -> Callable[[int], None]:
        batch = x.expand(batch_size, *x.shape).contiguous()

        def work(num: int) -> None:
            enabled = dtype == torch.bfloat16
            with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled):
                for _ in range(num // batch_size):
                    model(batch)

        return work

    for dtype, short in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        variants[short] = ours(dtype)
        variants[f"bare {short}"] = bare(dtype, batch_sizes[short])
    if compile:
        variants["bfloat16 compiled"] = ours(torch.bfloat16, compiled=True)

    # As many samples as take about `seconds`, in whole batches.
    samples = {}
    for variant, work in variants.items():
        size = batch_sizes.get(variant.removeprefix("bare ").split()[0], yardstick_batch)
        first = rate(work, size, device)
        samples[variant] = max(1, round(first * seconds / size)) * size
    rates: dict[str, list[float]] = {variant: [] for variant in variants}
    for _ in range(repeats):
        for variant, work in variants.items():
            rates[variant].append(rate(work, samples[variant], device))

    ceilings = {
        short: matmul_ceiling(dtype, device)
        for short, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
    }
    result = {"model": name, "gflops_a_sample": flops / 1e9, "batch_sizes": batch_sizes}
    result["ceiling_gflops"] = {short: round(value / 1e9) for short, value in ceilings.items()}
    result["variants"] = {}
    print(
        f"\n{name}: {flops / 1e9:.2f} GFLOP a sample; ceilings {result['ceiling_gflops']} GFLOP/s"
    )
    for variant in variants:
        middle = median(rates[variant])
        ceiling = ceilings["bfloat16" if "bfloat16" in variant else "float32"]
        ratios = [a / b for a, b in zip(rates[variant], rates["yardstick"], strict=True)]
        result["variants"][variant] = {
            "samples_a_second": round(middle, 2),
            "times_yardstick": round(median(ratios), 2),
            "share_of_ceiling": round(middle * flops / ceiling, 3),
        }
        facts = result["variants"][variant]
        print(
            f"  {variant:18} {middle:9.1f} samples/s  {facts['times_yardstick']:5.2f}x yardstick  "
            f"{facts['share_of_ceiling']:6.1%} of the ceiling"
        )
    for short in ("float32", "bfloat16"):
        ratios = [b / o for b, o in zip(rates[f"bare {short}"], rates[short], strict=True)]
        result[f"overhead_{short}"] = round(median(ratios) - 1, 4)
        print(f"  overhead over bare forward passes, {short}: {median(ratios) - 1:.1%}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seconds", type=float, default=10.0, help="of a timed run")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="time torch.compile too")
    parser.add_argument(
        "--yardstick-batch", type=int, default=400, help="published: 400; on a CPU 64 does as well"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    report = {
        "command": "python " + " ".join(sys.argv),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "results": [
            measure(
                name,
                device,
                arguments.seconds,
                arguments.repeats,
                arguments.compile,
                arguments.yardstick_batch,
            )
            for name in arguments.models
        ],
    }
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
