"""Fine-tuning's loop against the same steps written out plainly, and how the best is chosen."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import rrcm.finetune
from rrcm import data, noise
from rrcm.config import load_recipe
from rrcm.encoder import Classifier
from rrcm.finetune import finetune, validate
from rrcm.pretrain import build_encoder
from rrcm.training import seed_of

BATCH = 700  # two steps an epoch of the 1257 digits
TINY = [
    *("encoder.width=16", "encoder.depth=2", "encoder.heads=2"),
    *("encoder.projector_hidden=16", "encoder.projector_dim=8"),
    *(f"finetune.batch_size={BATCH}", "finetune.lr=0.01", "finetune.layer_decay=0.5"),
    *("finetune.epochs=2", "finetune.warmup_epochs=1", "finetune.view=affine"),
    *("finetune.lbd=3", "finetune.eta=0.7", "finetune.weight_decay=0.1", "finetune.clip=0.02"),
    "finetune.precision=float32",
]
CPU = torch.device("cpu")
SIGMA = 0.25
HEAD_LR = [1.0, 0.5]  # half a cosine over the two steps of the head's epoch
LR = [0.0, 0.5, 1.0, 0.5]  # an epoch of warm-up, then half a cosine over the other


def initial_classifier(recipe):
    torch.manual_seed(seed_of(recipe.seed, "init"))
    encoder = build_encoder(recipe)
    torch.manual_seed(seed_of(recipe.seed, "head"))
    return Classifier(encoder, 10, SIGMA, recipe.finetune.head_input)


def layer_scale(name):
    """METHOD, section 4, at depth 2 and a layer decay of 0.5."""
    if name.startswith(("encoder.patch_embed", "encoder.cls_token", "encoder.pos_embed")):
        return 0.125
    return {"encoder.blocks.0": 0.25, "encoder.blocks.1": 0.5}.get(name[:16], 1.0)


def entropy(p):
    return -(p * p.log()).sum(-1).mean()


def clean_loss(classifier, x, labels):
    logits = classifier.logits(x, 0.002)
    return F.cross_entropy(logits, labels) + 0.7 * entropy(logits.softmax(1))


def noisy_loss(classifier, x, labels, copies):
    grid = noise.karras_sigmas(81)
    level = grid[(grid - 2 * SIGMA).abs().argmin()].item()
    noisy = x.repeat(copies, 1, 1, 1)
    noisy = noisy + 2 * SIGMA * torch.randn_like(noisy)
    logits = [classifier.logits(copy, level) for copy in noisy.chunk(copies)]
    loss = sum(F.cross_entropy(copy, labels) for copy in logits) / copies
    if copies == 1:
        return loss
    p = torch.stack([copy.softmax(1) for copy in logits])
    mean = p.mean(0)
    kl = (mean * (mean.log() - p.log())).sum(-1).mean()
    return loss + 3 * kl + 0.7 * entropy(mean)


def plain_finetuning(recipe):
    """METHOD, section 4: the classifier after all steps in float32."""
    settings = recipe.finetune
    train = data.load_images("digits", "train", image_size=8, channels=1)
    augment = data.finetune_view("affine", 8)
    classifier = initial_classifier(recipe)
    named = {n: p for n, p in classifier.named_parameters() if "projector" not in n}
    head = {n: p for n, p in named.items() if n.startswith("head.")}
    tuned = {n: p for n, p in named.items() if not (settings.freeze_head and n in head)}
    head_optimizer = torch.optim.AdamW(head.values(), weight_decay=0.0)
    groups = [{"params": [p], "scale": layer_scale(n)} for n, p in tuned.items()]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1)

    shares = [*HEAD_LR, *LR] if settings.head_epochs else LR
    for step, share in enumerate(shares):
        torch.manual_seed(seed_of(recipe.seed, "finetune", step))
        chosen = data.batch_indices(len(train), BATCH, step, recipe.seed)
        pixels, labels = train.batch(chosen)
        x = 2 * augment(pixels / 255) - 1
        if head_stage := step < len(shares) - len(LR):
            loss = clean_loss(classifier, x, labels)
        else:
            loss = noisy_loss(classifier, x, labels, settings.copies)
        learning = (head if head_stage else tuned).values()
        classifier.zero_grad()
        loss.backward()
        gradients = [p.grad for p in learning if p.grad is not None]
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        for gradient in gradients:
            gradient *= min(1.0, 0.02 / norm.item())
        for group in (head_optimizer if head_stage else optimizer).param_groups:
            group["lr"] = 0.01 * BATCH / 256 * share * group.get("scale", 1.0)
        (head_optimizer if head_stage else optimizer).step()
    return classifier.state_dict()


def checkpoint(folder, step):
    state = load_file(folder / "checkpoints" / f"{step:09d}.safetensors")
    own = {name.partition(".") for name in state}
    return {key: state[f"{part}.{key}"] for part, _, key in own if part == "classifier"}


@pytest.mark.parametrize(
    "changes",
    [
        ["finetune.copies=2", "finetune.head_input=norm"],
        ["finetune.copies=1", "finetune.head_input=prenorm"],
        ["finetune.copies=3", "finetune.head_epochs=1"],
        ["finetune.copies=2", "finetune.head_epochs=1", "finetune.freeze_head=true"],
    ],
    ids=["copies", "one copy, prenorm", "head first", "head first, then frozen"],
)
def test_a_few_steps_equal_the_same_steps_written_out(tmp_path, changes):
    recipe = load_recipe("digits", [*TINY, *changes])
    finetune(recipe, SIGMA, tmp_path, CPU, encoder_dir=None)
    plain = plain_finetuning(recipe)
    ours = checkpoint(tmp_path, 6 if recipe.finetune.head_epochs else 4)
    assert ours.keys() == plain.keys()
    for name, value in plain.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=2e-5, msg=name)


def test_each_stage_trains_its_part_alone(tmp_path):
    changes = ["finetune.head_epochs=1", "finetune.freeze_head=true", "finetune.epochs=1"]
    changes += ["finetune.warmup_epochs=0", "finetune.checkpoint_every=2"]
    recipe = load_recipe("digits", [*TINY, *changes])
    finetune(recipe, SIGMA, tmp_path, CPU, encoder_dir=None)
    before = initial_classifier(recipe).state_dict()
    between, after = checkpoint(tmp_path, 2), checkpoint(tmp_path, 4)
    for name in before:
        is_head, is_unused = name.startswith("head."), "projector" in name
        assert between[name].equal(before[name]) == (not is_head), name
        assert after[name].equal(between[name]) == (is_head or is_unused), name


@pytest.fixture
def epochs(monkeypatch):
    """Stands in for `validate`: gives these accuracies in turn and keeps the weights it saw."""

    class Epochs:
        def __init__(self):
            self.accuracies, self.weights = [], []

        def validate(self, classifier, images, sigma, precision, device):
            assert images.split == "validation"
            assert sigma == SIGMA
            self.weights.append({n: v.clone() for n, v in classifier.state_dict().items()})
            return self.accuracies[len(self.weights) - 1]

    epochs = Epochs()
    monkeypatch.setattr(rrcm.finetune, "validate", epochs.validate)
    return epochs


def test_the_best_epoch_at_sigma_is_kept_and_of_equals_the_last(tmp_path, epochs):
    at_sigma = [0.9, 0.3, 0.6, 0.6, 0.5]  # the first is the head's epoch: no candidate
    epochs.accuracies = [
        {0.0: 0.1 * i, 0.5: value, 1.0: 1 - value, 2.0: 0.0} for i, value in enumerate(at_sigma)
    ]
    changes = ["finetune.head_epochs=1", "finetune.epochs=4", "finetune.checkpoint_every=2"]
    recipe = load_recipe("digits", [*TINY, *changes])

    def chosen():
        folder = finetune(recipe, SIGMA, tmp_path, CPU, encoder_dir=None)
        saved = load_file(folder / "model.safetensors")
        equal = [all(saved[n].equal(seen[n]) for n in saved) for seen in epochs.weights]
        return [epoch for epoch, same in enumerate(equal) if same]

    assert chosen() == [3]
    # A resumed run still knows the best: the last epoch, done again, is no better.
    (tmp_path / "checkpoints" / "000000010.safetensors").unlink()
    epochs.accuracies.append(epochs.accuracies[-1])
    assert chosen() == [3]
    assert len(epochs.weights) == 6


def test_the_test_split_is_never_read(tmp_path, monkeypatch):
    splits = []
    load_images = data.load_images

    def recorded(source, split, **options):
        splits.append(split)
        return load_images(source, split, **options)

    monkeypatch.setattr(data, "load_images", recorded)
    finetune(load_recipe("digits", TINY), SIGMA, tmp_path, CPU, encoder_dir=None)
    assert sorted(splits) == ["train", "validation"]


class Stub(torch.nn.Module):
    """A linear classifier of pixels that keeps what it was shown."""

    def __init__(self):
        super().__init__()
        self.weight = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
        self.seen = []

    def logits(self, x, level):
        assert not self.training
        self.seen.append((x, level))
        return x.flatten(1) @ self.weight.T


def test_validation_adds_noise_of_each_level_and_reads_it_there():
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (30, 1, 4, 4), generator=generator, dtype=torch.uint8)
    labels = torch.arange(30) % 3
    images = data.from_pixels(pixels, labels, "abc", name="tiny")
    stub = Stub()
    found = validate(stub, images, 0.3, "float32", CPU, batch_size=30)

    levels = [0.0, 0.5, 0.6, 1.0, 2.0]  # those of every run, and 2 sigma
    assert list(found) == levels
    grid = noise.karras_sigmas(81)
    for t, (x, level) in zip(levels, stub.seen, strict=True):
        draws = len(x) // 30
        assert draws == (34 if t == 0.6 else 1)  # at sigma, at least 1000 noisy images
        eps = x.view(draws, 30, 1, 4, 4) - (2 * (pixels / 255) - 1)
        assert eps.std() == pytest.approx(t, rel=0.1, abs=1e-6)
        assert eps.mean() == pytest.approx(0.0, abs=0.15 * t + 1e-6)
        if draws > 1:
            assert eps.std(0).mean() == pytest.approx(t, rel=0.1)  # the draws differ
        assert level == pytest.approx(grid[(grid - t).abs().argmin()].item())
        right = (x.flatten(1) @ stub.weight.T).argmax(1) == labels.repeat(draws)
        assert found[t] == pytest.approx(right.float().mean().item())
    assert stub.training

    # The same noise at every call, whatever was drawn in between.
    torch.manual_seed(123)
    first = [x for x, _ in stub.seen]
    stub.seen.clear()
    assert validate(stub, images, 0.3, "float32", CPU, batch_size=30) == found
    assert all(x.equal(y) for x, (y, _) in zip(first, stub.seen, strict=True))


def test_validation_counts_every_image_of_a_last_small_batch():
    pixels = torch.zeros(7, 1, 4, 4, dtype=torch.uint8)
    images = data.from_pixels(pixels, torch.zeros(7, dtype=torch.int64), "abc", name="tiny")
    stub = Stub()
    stub.weight = torch.tensor([[-1.0], [1.0], [1.0]]).expand(3, 16)  # black is class 0
    assert validate(stub, images, 0.1, "float32", CPU, batch_size=3)[0.0] == 1.0
