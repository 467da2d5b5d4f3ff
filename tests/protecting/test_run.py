"""`protect` end to end: the release, its independence of this package, interruption and resume."""

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    MobileNetV2Config,
    MobileNetV2Model,
)

import pico
from trap2.checkpoint import Checkpoint
from trap2.errors import TrainingStopped, UserError
from trap2.files import file_digest
from trap2.protecting import run
from trap2.protecting.callbacks import BestCandidate
from trap2.protecting.run import protect
from trap2.protecting.scaled import LiveUpdate
from trap2.protecting.trainable import trainable
from trap2.recipes import Recipe
from trap2.statistics import mixed, recount
from trap2.tasks.data import load_rows
from trap2.tasks.evaluation import Classification
from trap2.tasks.model import Inputs, build, load_encoder
from trap2.update import Update

KINDS = [
    (head, method) for head in ("description", "classifier", "image") for method in ("lora", "full")
]
QUICK = {"strength": 0.3, "warmup": 2, "ramp": 1, "readout_weight": 1.0}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return pico.write_task(tmp_path_factory.mktemp("task"), rows=24)


@pytest.fixture(scope="module")
def mobile(tmp_path_factory: pytest.TempPathFactory, pico_vit: Path) -> Path:
    """A pico MobileNetV2: pointwise and depthwise convolutions, and batch norms."""
    folder = tmp_path_factory.mktemp("mobile")
    torch.manual_seed(0)
    config = MobileNetV2Config(
        image_size=8,
        depth_multiplier=0.1,
        min_depth=4,
        depth_divisible_by=4,
        tf_padding=False,
    )
    model = MobileNetV2Model(config)
    with torch.no_grad():
        for _ in range(30):  # running statistics that fit, as a trained base has
            model(torch.randn(16, 3, 8, 8))
    model.save_pretrained(folder)
    shutil.copy(pico_vit / "preprocessor_config.json", folder)
    return folder


@pytest.fixture
def text(pico_base: Path, files: dict[str, str]) -> Callable[..., Recipe]:
    """Make a recipe for the text task; keywords are settings of the trap."""

    def make(
        head: str = "description",
        method: str = "lora",
        training: Any = None,
        seed: int = 0,
        **trap2: Any,
    ) -> Recipe:
        task = pico.task("words", files, descriptions=head == "description")
        content = pico.recipe(pico_base, task, method, **{**QUICK, **trap2})
        content["training"] |= {"evaluate_every": 2} | (training or {})
        return Recipe.model_validate({**content, "seed": seed})

    return make


def image(base: Path, images: Path, method: str) -> Recipe:
    task = {"name": "colours", "kind": "image", "data": {"imagefolder": str(images)}}
    task["classes"] = ["red", "green", "blue"]
    content = pico.recipe(base, task, method, steps=6, **QUICK)
    return Recipe.model_validate(content)


class Witness:
    """What the trained model answered on validation rows when it was written."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.result: Classification | None = None
        real = run.write_release

        def write(folder: Path, **parts: Any) -> None:
            self.result = parts["validation"]()
            real(folder, **parts)

        patch.setattr(run, "write_release", write)


@pytest.fixture(scope="module")
def releases(
    tmp_path_factory: pytest.TempPathFactory,
    pico_base: Path,
    pico_vit: Path,
    mobile: Path,
    pico_images: Path,
    files: dict[str, str],
) -> Callable[[str, str], tuple[Path, Recipe, Classification]]:
    """Make each kind of release once: its folder, its recipe, and the trained model's answers."""
    made: dict[tuple[str, str], tuple[Path, Recipe, Classification]] = {}
    folder = tmp_path_factory.mktemp("releases")

    def get(head: str, method: str) -> tuple[Path, Recipe, Classification]:
        if (head, method) not in made:
            if head == "image":
                recipe = image(mobile if method == "lora" else pico_vit, pico_images, method)
            else:
                task = pico.task("words", files, descriptions=head == "description")
                recipe = Recipe.model_validate(pico.recipe(pico_base, task, method, **QUICK))
            with pytest.MonkeyPatch.context() as patch:
                witness = Witness(patch)
                out = protect(recipe, folder / f"{head}-{method}", quiet=True)
            assert witness.result is not None
            made[head, method] = out, recipe, witness.result
        return made[head, method]

    return get


def loaded_without_this_package(out: Path, recipe: Recipe) -> torch.nn.Module:
    auto: Any = {
        True: AutoModel,
        False: AutoModelForSequenceClassification
        if recipe.task.kind == "text"
        else AutoModelForImageClassification,
    }[recipe.task.descriptions is not None]
    labels = {} if recipe.task.descriptions else {"num_labels": 3}
    if recipe.method == "full":
        return auto.from_pretrained(out).eval()
    model = auto.from_pretrained(recipe.base, **labels)
    return PeftModel.from_pretrained(model, out).eval()


@torch.no_grad()
def answers(out: Path, recipe: Recipe) -> Tensor:
    """Logits on validation rows, with transformers and peft alone."""
    model = loaded_without_this_package(out, recipe)
    rows = load_rows(recipe.task, "validation", recipe.seed).inputs
    processors = out if recipe.method == "full" else recipe.base
    if recipe.task.kind == "image":
        processor = AutoImageProcessor.from_pretrained(processors)
        return model(**processor([i.convert("RGB") for i in rows], return_tensors="pt")).logits
    tokenizer = AutoTokenizer.from_pretrained(processors)

    def pooled(encoder: Any, text: str) -> Tensor:
        inputs = tokenizer(text, return_tensors="pt")
        states = encoder(inputs["input_ids"]).last_hidden_state[0]
        return torch.nn.functional.normalize(states.mean(0), dim=0)

    if not recipe.task.descriptions:
        one = [model(tokenizer(row, return_tensors="pt")["input_ids"]).logits[0] for row in rows]
        return torch.stack(one)
    base = AutoModel.from_pretrained(recipe.base).eval()
    prototypes = torch.stack([pooled(base, text) for text in recipe.task.descriptions])
    embedded = torch.stack([pooled(model, row) for row in rows])
    return recipe.task.temperature * embedded @ prototypes.T


def contents(folder: Path) -> dict[str, str]:
    return {p.name: file_digest(p) for p in sorted(folder.iterdir())}


def refusal(kind: type[Exception], call: Callable[[], object]) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# The release


@pytest.mark.parametrize(("head", "method"), KINDS)
def test_a_release_answers_the_same_without_this_package(
    releases: Any, head: str, method: str
) -> None:
    out, recipe, trained = releases(head, method)
    assert torch.allclose(answers(out, recipe), trained.logits, atol=2e-4)
    assert trained.logits.std() > 0.01


@pytest.mark.parametrize(("head", "method"), KINDS)
def test_a_release_opens_as_an_update_of_its_base(releases: Any, head: str, method: str) -> None:
    out, recipe, _ = releases(head, method)
    update = Update.open(out, recipe.base)
    assert update.kind == method
    heads = [] if head == "description" else ["classifier.bias", "classifier.weight"]
    assert sorted(update.head) == heads
    moved = [name for name, delta in update if delta.any()]
    if method == "lora":
        assert moved == list(update.shared)
        assert all(name.endswith(".weight") for name in moved)
    if head == "image" and method == "lora":
        assert any("expand_1x1.convolution" in name for name in moved)
        assert not any("conv_3x3" in name for name in moved)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_in_mixed_precision_it_trains_in_bfloat16_and_releases_float32(
    text: Callable[..., Recipe], tmp_path: Path, method: str
) -> None:
    kinds: set[torch.dtype] = set()
    linear = torch.nn.functional.linear

    def watched(*given: Tensor) -> Tensor:
        result = linear(*given)
        kinds.add(result.dtype)
        return result

    updates = {}
    for precision in ("float32", "bfloat16"):
        recipe = text(method=method, training={"precision": precision})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.functional, "linear", watched)
            kinds.clear()
            run.protect(recipe, tmp_path / precision, quiet=True)
        assert (torch.bfloat16 in kinds) == (precision == "bfloat16")
        updates[precision] = dict(Update.open(tmp_path / precision, recipe.base))
    exact, mixed = updates.values()
    assert all(value.dtype == torch.float32 for value in mixed.values())
    assert any(not torch.equal(exact[name], mixed[name]) for name in exact)
    one, other = (torch.cat([u[name].flatten() for name in exact]) for u in (exact, mixed))
    assert torch.cosine_similarity(one, other, dim=0) > 0.8


@pytest.mark.parametrize(("head", "method"), KINDS)
def test_the_record_tells_how_a_release_was_made(releases: Any, head: str, method: str) -> None:
    out, recipe, trained = releases(head, method)
    record = json.loads((out / "trap2.json").read_text())
    assert record["schema_version"] == 1
    assert Recipe.model_validate(record["recipe"]) == recipe
    assert record["trap2"]["strength"] == 0.3
    assert record["trap2"]["warmup"] == 2
    assert record["seed"] == record["trap2"]["scale_seed"] == 0
    assert {"python", "trap2", "torch", "transformers", "peft"} <= {*record["versions"]}
    assert record["digests"]["base"] == Checkpoint(recipe.base).digest
    weights = {p.name: file_digest(p) for p in out.glob("*.safetensors")}
    assert record["digests"]["files"] == weights
    assert record["dropped_traps"] == 0
    log = record["log"]
    every = math.gcd(10, recipe.training.evaluate_every)
    assert [entry["step"] for entry in log] == [*range(every, recipe.training.steps + 1, every)]
    assert all(entry["loss"] > 0 for entry in log)
    assert "trap2/trap_loss" not in log[0]  # the warm-up
    shown = ("trap_loss", "scale", "strength", "dropped", "eased", "kept", "conflict")
    assert {f"trap2/{name}" for name in shown} <= {*log[-1]}
    assert all(0 <= entry["trap2/conflict"] <= 1 for entry in log[2:])
    validation = record["validation"]
    assert validation["rows"] == len(trained.labels)
    assert validation["chosen"] in validation["history"]
    best = max(c["score"] for c in validation["history"])
    assert validation["chosen"]["score"] == pytest.approx(best, abs=1e-4)
    assert validation["chosen"]["utility"] == trained.accuracy
    curve = {point["s"]: point for point in validation["scale_curve"]}
    assert curve[1.0]["accuracy"] == trained.accuracy
    assert curve[1.0]["loss"] == pytest.approx(trained.loss, rel=1e-3)
    assert len({round(point["loss"], 4) for point in curve.values()}) > 3


def test_the_card_claims_little_and_names_the_limits(releases: Any) -> None:
    card = (releases("description", "lora")[0] / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\ntags:\n- trap2\n---\n")
    assert "# words: protected with trap2" in card
    assert "**Whether merges fail is not claimed here**" in card
    for limit in ("A merge can keep it at scale 1", "Routing is not merging", "Distillation is"):
        assert limit in card
    full = (releases("classifier", "full")[0] / "README.md").read_text()
    assert full.startswith("---\ntags:\n- trap2\n---\n")


def test_nothing_but_the_release_is_left(releases: Any) -> None:
    for head, method in KINDS:
        out, _, _ = releases(head, method)
        beside = {path.name for path in out.parent.iterdir()}
        assert not any(name.endswith((".work", ".partial", ".old")) for name in beside)
    assert {*contents(releases("classifier", "full")[0])} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "trap2.json",
    }
    assert {*contents(releases("description", "lora")[0])} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "trap2.json",
    }


# The run


class Watch:
    """Records the nominal loss of every step; may do something after one of them."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.losses: dict[int, float] = {}
        self.at: dict[int, Callable[[], object]] = {}
        real = BestCandidate.on_step_end

        def on_step_end(
            best: BestCandidate, args: Any, state: Any, control: Any, **more: Any
        ) -> None:
            real(best, args, state, control, **more)
            self.losses[state.global_step] = best._trainer.last.nominal
            self.at.get(state.global_step, lambda: None)()

        patch.setattr(BestCandidate, "on_step_end", on_step_end)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch)


def interrupt() -> None:
    raise KeyboardInterrupt


def test_a_control_is_the_same_run_until_the_trap_starts(
    text: Callable[..., Recipe], tmp_path: Path, watch: Watch, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = {}
    for strength in (0.3, 0.0):
        watch.losses = losses[strength] = {}
        protect(text(strength=strength), tmp_path / str(strength))
    shown = capsys.readouterr().err
    assert "words with the trap" in shown
    assert "words without a trap" in shown
    protected, control = losses[0.3], losses[0.0]
    assert list(protected) == list(control) == list(range(1, 9))
    # Two plain steps, and the loss of the third is read before its update.
    assert [protected[i] for i in (1, 2, 3)] == [control[i] for i in (1, 2, 3)]
    assert all(protected[i] != control[i] for i in range(4, 9))
    record = json.loads((tmp_path / "0.0" / "trap2.json").read_text())
    assert record["trap2"]["strength"] == 0
    assert {candidate["leak"] for candidate in record["validation"]["history"]} == {None}
    card = (tmp_path / "0.0" / "README.md").read_text()
    assert "unprotected control, trained without a trap" in card
    assert "Nothing is claimed: this release exists to compare the protected one with." in card


@pytest.mark.parametrize("head", ["description", "classifier"])
def test_recomputed_activations_change_nothing(
    text: Callable[..., Recipe], tmp_path: Path, head: str
) -> None:
    weights = []
    for on in (False, True):
        recipe = text(
            head, training={"gradient_checkpointing": on, "steps": 4, "evaluate_every": 4}
        )
        out = protect(recipe, tmp_path / str(on), quiet=True)
        weights.append(load_file(out / "adapter_model.safetensors"))
    assert all(torch.allclose(weights[0][n], weights[1][n], atol=1e-5) for n in weights[0])


def test_a_base_that_cannot_recompute_says_so(
    mobile: Path, pico_images: Path, tmp_path: Path
) -> None:
    content = image(mobile, pico_images, "lora").model_dump()
    content["training"]["gradient_checkpointing"] = True
    message = refusal(UserError, lambda: protect(Recipe(**content), tmp_path / "out", quiet=True))
    assert message.endswith("does not support training.gradient_checkpointing; set it to false")


# Interruption


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, pico_base: Path, files: dict[str, str]
) -> tuple[Recipe, Path]:
    """An uninterrupted run, to compare resumed ones with."""
    content = pico.recipe(pico_base, pico.task("words", files), **QUICK)
    content["training"]["evaluate_every"] = 2
    recipe = Recipe.model_validate(content)
    return recipe, protect(recipe, tmp_path_factory.mktemp("whole") / "out", quiet=True)


def same_release(one: Path, two: Path) -> None:
    weights = "adapter_model.safetensors"
    assert (one / weights).read_bytes() == (two / weights).read_bytes()
    records = [json.loads((out / "trap2.json").read_text()) for out in (one, two)]
    assert records[0]["validation"] == records[1]["validation"]
    assert records[0]["digests"] == records[1]["digests"]
    assert records[0]["log"] == records[1]["log"]


def test_an_interrupted_run_is_kept_and_resumed_to_the_same_bits(
    whole: tuple[Recipe, Path], tmp_path: Path, watch: Watch
) -> None:
    recipe, reference = whole
    out, work = tmp_path / "out", tmp_path / "out.work"
    watch.at[5] = interrupt
    with pytest.raises(KeyboardInterrupt):
        protect(recipe, out, quiet=True)
    assert not out.exists()
    assert {p.name for p in (work / "checkpoints").iterdir()} == {"checkpoint-2", "checkpoint-4"}
    watch.at.clear()
    assert refusal(UserError, lambda: protect(recipe, out, quiet=True)) == (
        f"{work} holds an interrupted run; pass --resume to go on or --overwrite to start again"
    )
    other = recipe.model_copy(update={"seed": 1})
    assert refusal(UserError, lambda: protect(other, out, resume=True, quiet=True)) == (
        f"{work} was left by another recipe; resume with that one, or run without --resume"
    )
    damaged = tmp_path / "damaged"
    shutil.copytree(work, tmp_path / "damaged.work")
    state = tmp_path / "damaged.work" / "checkpoints" / "checkpoint-4" / "trainer_state.json"
    state.write_text(state.read_text()[:50])

    watch.losses = {}
    protect(recipe, out, resume=True, quiet=True)
    assert list(watch.losses) == [5, 6, 7, 8]
    same_release(out, reference)
    assert not work.exists()

    watch.losses = {}
    protect(recipe, damaged, resume=True, quiet=True)
    assert list(watch.losses) == [3, 4, 5, 6, 7, 8]
    same_release(damaged, reference)


def test_a_run_interrupted_before_its_first_checkpoint_starts_anew(
    whole: tuple[Recipe, Path], tmp_path: Path, watch: Watch
) -> None:
    recipe, reference = whole
    for again in ({"resume": True}, {"overwrite": True}):
        out = tmp_path / next(iter(again))
        watch.at[1] = interrupt
        with pytest.raises(KeyboardInterrupt):
            protect(recipe, out, quiet=True)
        watch.at.clear()
        protect(recipe, out, quiet=True, **again)
        same_release(out, reference)


KILLS = {
    "after a step": """run.BestCandidate, "on_step_end", lambda best, args, state, *_:
        state.global_step == 5""",
    "in a checkpoint": """trainer._ProtectedMixin, "_save_rng_state", lambda mine, folder:
        folder.endswith("checkpoint-4")""",
    "in the release": 'release, "write_json", lambda *_: True',
}
"""What is not reached any more: in a checkpoint all after its weights, in a release its record."""


@pytest.mark.parametrize("when", list(KILLS))
def test_a_killed_run_is_resumed_to_the_same_bits(
    when: str, whole: tuple[Recipe, Path], tmp_path: Path
) -> None:
    recipe, reference = whole
    out, written = tmp_path / "out", tmp_path / "recipe.json"
    written.write_text(recipe.model_dump_json())
    script = (
        "import os, sys, pathlib\n"
        "from trap2.protecting import release, run, trainer\n"
        "from trap2.recipes import Recipe\n"
        f"owner, name, now = ({KILLS[when]})\n"
        "real = getattr(owner, name)\n"
        "def killed(*args, **more):\n"
        "    if now(*args): os.kill(os.getpid(), 9)\n"
        "    return real(*args, **more)\n"
        "setattr(owner, name, killed)\n"
        "recipe = Recipe.model_validate_json(pathlib.Path(sys.argv[1]).read_text())\n"
        "run.protect(recipe, pathlib.Path(sys.argv[2]), quiet=True)\n"
    )
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [sys.executable, "-c", script, str(written), str(out)],
        env=os.environ | threads,
        check=False,
        capture_output=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    assert not out.exists()
    protect(recipe, out, resume=True, quiet=True)
    same_release(out, reference)


def test_resuming_nothing_is_refused(text: Callable[..., Recipe], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert refusal(UserError, lambda: protect(text(), out, resume=True, quiet=True)) == (
        f"{out}.work holds no interrupted run; run without --resume"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_start_that_fails_leaves_nothing_in_the_way(
    text: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = text(training={"steps": 2})
    content = recipe.model_dump(mode="json")
    broken = []
    for place, key, value in (
        (content["task"]["data"], "train", str(tmp_path / "no.csv")),
        (content, "base", str(tmp_path / "no")),
        (content["lora"], "targets", ["nothing_like_it"]),
        (content["trap2"], "loss", "decoi"),
    ):
        kept, place[key] = place.get(key, "decoy"), value
        broken.append(Recipe.model_validate(content))
        place[key] = kept
    for one in broken:
        refusal(UserError, lambda one=one: protect(one, tmp_path / "out", quiet=True))  # type: ignore[misc]
        assert list(tmp_path.iterdir()) == []
    protect(recipe, tmp_path / "out", quiet=True)
    assert (tmp_path / "out" / "trap2.json").is_file()


# Failures


@pytest.mark.parametrize("rate", [1e30, 3e38])
def test_a_run_that_breaks_its_weights_stops_and_keeps_its_checkpoints(
    text: Callable[..., Recipe], tmp_path: Path, watch: Watch, rate: float
) -> None:
    recipe = text("classifier", "full", {"evaluate_every": 1, "learning_rate": rate})
    out = tmp_path / "out"
    message = refusal(TrainingStopped, lambda: protect(recipe, out, quiet=True))
    assert "training stopped" in message
    assert not out.exists()
    assert (tmp_path / "out.work" / "recipe.json").is_file()


def test_a_run_on_broken_numbers_stops_before_the_first_step(
    text: Callable[..., Recipe], pico_base: Path, tmp_path: Path, watch: Watch
) -> None:
    base = Path(shutil.copytree(pico_base, tmp_path / "base"))
    weights = load_file(base / "model.safetensors")
    weights["embeddings.LayerNorm.weight"][0] = float("nan")
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    recipe = text().model_copy(update={"base": str(base)})
    message = refusal(TrainingStopped, lambda: protect(recipe, tmp_path / "out", quiet=True))
    assert message.startswith("nominal loss is nan at step 0; training stopped before the weights")
    assert watch.losses == {}


@pytest.mark.parametrize("share", [0.5, 1.5])  # too little for the weights; for the optimizer only
def test_a_full_disk_ends_in_one_line_and_the_run_goes_on_later(
    text: Callable[..., Recipe], releases: Any, tmp_path: Path, watch: Watch, share: float
) -> None:
    weights = releases("classifier", "lora")[0] / "adapter_model.safetensors"
    recipe, out = text("classifier", training={"steps": 4}), tmp_path / "out"
    room = int(share * weights.stat().st_size)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    watch.at[3] = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        message = refusal(UserError, lambda: protect(recipe, out, quiet=True))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert message.startswith(f"cannot write checkpoints in {out}.work: ")
    assert message.endswith("; free space, then go on with --resume")
    assert ("inline_container" in message) is (share > 1)
    assert not out.exists()
    watch.at.clear()
    watch.losses.clear()
    protect(recipe, out, resume=True, quiet=True)
    assert list(watch.losses) == [3, 4]


def test_what_is_there_is_untouched_unless_it_is_overwritten(
    text: Callable[..., Recipe], tmp_path: Path, watch: Watch
) -> None:
    out = tmp_path / "out"
    protect(text(training={"steps": 2}), out, quiet=True)
    before, recipe = contents(out), text(training={"steps": 2}, seed=1)
    assert refusal(UserError, lambda: protect(recipe, out, quiet=True)) == (
        f"{out} exists already; pass --overwrite or choose another output folder"
    )
    watch.at[1] = interrupt
    with pytest.raises(KeyboardInterrupt):
        protect(recipe, out, overwrite=True, quiet=True)
    assert contents(out) == before
    watch.at.clear()
    protect(recipe, out, overwrite=True, quiet=True)
    after = contents(out)
    assert {*after} == {*before}
    assert after["adapter_model.safetensors"] != before["adapter_model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# What is trained


def test_every_module_outside_the_encoder_is_released_with_an_adapter(
    pico_base: Path, tmp_path: Path, text: Callable[..., Recipe]
) -> None:
    config = DistilBertConfig(
        vocab_size=42, dim=16, n_layers=1, n_heads=2, hidden_dim=16, max_position_embeddings=32
    )
    DistilBertModel(config).save_pretrained(tmp_path)
    for path in pico_base.glob("tokenizer*"):
        shutil.copy(path, tmp_path)
    recipe = text("classifier").model_copy(update={"base": str(tmp_path)})
    inputs = Inputs(tmp_path, recipe.task)
    model: Any = trainable(build(tmp_path, recipe.task, load_encoder(tmp_path), inputs), recipe)
    adapter = model.peft_config["default"]
    assert adapter.modules_to_save == ["pre_classifier", "classifier"]
    assert all(target.startswith("distilbert.") for target in adapter.target_modules)
    assert all("lora_B" in item.name for item in LiveUpdate(model).shared)


def test_linear_maps_and_pointwise_convolutions_are_adapted_but_no_pooler(
    releases: Any,
) -> None:
    out, recipe, _ = releases("description", "lora")
    targets = json.loads((out / "adapter_config.json").read_text())["target_modules"]
    encoder = BertModel.from_pretrained(recipe.base)
    linear = [n for n, m in encoder.named_modules() if isinstance(m, torch.nn.Linear)]
    assert sorted(targets) == sorted(name for name in linear if "pooler" not in name)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_running_statistics_are_the_base_s_with_an_adapter_and_counted_anew_without(
    mobile: Path, pico_images: Path, tmp_path: Path, method: str
) -> None:
    recipe = image(mobile, pico_images, method)
    out = protect(recipe, tmp_path / "out", quiet=True)
    if method == "lora":
        assert not any("running" in name for name in Update.open(out, mobile).shared)
        encoder = load_encoder(mobile)
        model = trainable(build(mobile, recipe.task, encoder, Inputs(mobile, recipe.task)), recipe)
        norms = [m for m in model.train().modules() if isinstance(m, torch.nn.BatchNorm2d)]
        assert norms
        assert not any(norm.training for norm in norms)
        assert not LiveUpdate(model).ties_rows
        return
    released: Any = AutoModelForImageClassification.from_pretrained(out).eval()
    kept = {name: value.clone() for name, value in released.state_dict().items()}
    inputs, rows = Inputs(mobile, recipe.task), load_rows(recipe.task, "train", recipe.seed)
    assert len(rows) <= run.COUNTED_ROWS
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(recipe.seed))
    batches = [inputs.batch([rows.inputs[i] for i in some]) for some in mixed([order.tolist()])]
    recount(released, batches)
    moved = [name for name in kept if "running" in name]
    assert moved
    for name in moved:
        torch.testing.assert_close(released.state_dict()[name], kept[name], rtol=1e-3, atol=1e-5)


def test_a_dora_release_is_its_base_plus_its_update(
    pico_base: Path, files: dict[str, str], tmp_path: Path
) -> None:
    content = pico.recipe(pico_base, pico.task("words", files), "lora", **QUICK)
    content["lora"]["dora"] = True
    recipe = Recipe.model_validate(content)
    out = protect(recipe, tmp_path / "dora", quiet=True)
    update = Update.open(out, pico_base)
    assert update.kind == "adapter"
    merged = AutoModel.from_pretrained(pico_base).eval()
    for name in update.shared:
        merged.get_parameter(name).data.copy_(update.scaled(name, 1.0))
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        one = merged(input_ids=ids).last_hidden_state
        two = loaded_without_this_package(out, recipe)(input_ids=ids).last_hidden_state
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    curve = json.loads((out / "trap2.json").read_text())["validation"]["scale_curve"]
    assert len({round(point["loss"], 4) for point in curve}) > 3
