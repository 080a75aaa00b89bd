"""The training loop: what it reports, and trainings that are cut off and continued."""

import copy
import os
import pickle
import random
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import psutil
import pytest
import torch
from killing import killed_after

from fast_goal.config import FinetuneConfig
from fast_goal.errors import ConfigError, FastGoalError
from fast_goal.model.clip import Clip
from fast_goal.objectives import Plain, given, make_objective
from fast_goal.training import loop as loop_module
from fast_goal.training.average import Average
from fast_goal.training.batches import PairDataset
from fast_goal.training.best import Best
from fast_goal.training.checkpoint import states
from fast_goal.training.loader import Loader
from fast_goal.training.loop import autocast_dtype, finetune
from fast_goal.training.recorder import Recorder
from fast_goal.training.schedule import make_optimizer
from fast_goal.training.step import TrainStep, batch_features

WEIGHTS = {"global": 1.0, "local": 0.5, "tsl_image": 1.0, "tsl_text": 1.0}
GLOBAL = {"global": 1.0, "local": 0.0, "tsl_image": 0.0, "tsl_text": 0.0}
CPU = torch.device("cpu")
CONFIG = FinetuneConfig(
    view="crop",
    captions="long",
    pairs="best",
    precision="auto",
    gradient_clip=None,
    max_logit_scale=None,
    decayed="all",
    freeze=[],
    result="last",
    patience=None,
    ema=None,
    checkpointing=False,
    compile=False,
    length_groups=False,
    accumulate=1,
    layer_decay=1.0,
    head_rate=1.0,
    betas=[0.9, 0.999],
    adam_epsilon=1e-8,
    epochs=2,
    batch_size=4,
    learning_rate=1e-3,
    weight_decay=0.05,
    warmup_steps=0,
    processes=1,
    workers=0,
    log_every=2,
    save_every=2,
    decode="cpu",
    scaled_decoding=False,
    pixel_cache=False,
    shards=None,
    diverged=None,
    keep_states=2,
)


def fast_goal(weights=WEIGHTS, in_image_negatives=None):
    return make_objective(
        {
            "name": "fast_goal",
            "weights": weights,
            "target_matrix": "diagonal",
            "in_image_negatives": in_image_negatives,
            "alignment": "exact",
        }
    )


def test_every_input_is_encoded_once(make_scenes, tiny_clip):
    dataset, pairs = make_scenes()
    clip = tiny_clip()
    batch = PairDataset(dataset, "train", pairs[:3], clip)[[0, 1, 2, 3]]
    rows = {"image": 0, "text": 0}
    clip.model.visual.conv1.register_forward_hook(lambda m, i, o: rows.update(image=rows["image"] + len(o)))
    clip.model.token_embedding.register_forward_hook(lambda m, i, o: rows.update(text=rows["text"] + len(o)))
    batch_features(clip, batch)
    assert rows == {"image": 4 + 3, "text": 4 + 3}


def test_gradient_clip_bounds_the_update(make_scenes, tiny_clip):
    dataset, pairs = make_scenes()
    clip = tiny_clip()
    batch = PairDataset(dataset, "train", pairs, clip)[[0, 1, 2]]
    TrainStep(clip, fast_goal(), make_optimizer(clip.parameters(), 0.0, 0.0), gradient_clip=1e-3)([batch])
    norm = sum(parameter.grad.square().sum() for parameter in clip.parameters()).sqrt()
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)


def run(clip, dataset, pairs, path, config=CONFIG, objective=None, **more):
    arguments = {"seed": 5, "device": CPU, "state_path": path / "state.pt", "state_key": "key"} | more
    return finetune(clip, dataset, pairs, objective or fast_goal(), config, **arguments)


def without_rates(history):
    return [{name: value for name, value in record.items() if name != "samples_per_second"} for record in history]


def test_training_reports_and_learns(make_scenes, tiny_clip, tmp_path):
    dataset, pairs = make_scenes()
    clip, steps, epochs = tiny_clip(), [], []

    def on_epoch(model, epoch):
        assert not model.training
        epochs.append(epoch)
        return {"val_R@1": 10.0 * epoch}

    config = replace(CONFIG, epochs=8, log_every=4)
    summary = run(clip, dataset, pairs[:-1], tmp_path, config, on_step=lambda s, r: steps.append((s, r)), on_epoch=on_epoch)
    curve = [(step, record) for step, record in steps if "loss" in record]
    assert [step for step, _ in curve] == sorted({*range(4, 25, 4), *range(3, 25, 3)})
    assert set(curve[0][1]) == {"step", "epoch", "loss", *WEIGHTS, "learning_rate", "samples_per_second", "logit_scale"}
    assert curve[-1][1]["loss"] < curve[0][1]["loss"]
    assert curve[0][1]["learning_rate"] == pytest.approx(1e-3 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * 2 / 24)).item()))
    assert epochs == list(range(1, 9))
    assert [record for _, record in steps if "loss" not in record] == [
        {"step": 3 * epoch, "epoch": epoch, "val_R@1": 10.0 * epoch} for epoch in epochs
    ]
    assert summary["steps"] == 24 and summary["precision"] == "fp32" and summary["counts"]["without_pair"] == 1
    assert summary["final"]["loss"] == curve[-1][1]["loss"] and summary["samples_per_second"] > 0
    assert 0 < summary["step_seconds"] < os.cpu_count() * summary["seconds"] / summary["steps"]
    assert not clip.training


def test_adamw_has_the_settings(make_scenes, tiny_clip, tmp_path, monkeypatch):
    (dataset, pairs), made = make_scenes(), []
    monkeypatch.setattr(loop_module, "make_optimizer", lambda *values: made.append(make_optimizer(*values)) or made[-1])
    run(tiny_clip(), dataset, pairs, tmp_path, replace(CONFIG, epochs=1, betas=[0.8, 0.95], adam_epsilon=1e-3))
    assert {(group["betas"], group["eps"]) for group in made[0].param_groups} == {((0.8, 0.95), 1e-3)}


# all that a resumed training has to find again, at once
FULL = {
    "ema": 0.5,
    "accumulate": 2,
    "length_groups": True,
    "keep_states": 3,
    "layer_decay": 0.9,
    "warmup_steps": 3,
    "epochs": 4,
}


@pytest.mark.parametrize("killed", [2, 3, 4, 6])
def test_resume_is_bit_identical(make_scenes, tiny_clip, tmp_path, killed):
    dataset, pairs = make_scenes()
    whole, whole_history = tiny_clip(), []
    (tmp_path / "whole").mkdir()
    measure = lambda clip, epoch: {"val": float(epoch)}  # noqa: E731
    run(whole, dataset, pairs, tmp_path / "whole", on_step=lambda s, r: whole_history.append(r), on_epoch=measure)

    with killed_after(loop_module, killed):
        run(tiny_clip(), dataset, pairs, tmp_path, on_epoch=measure)
    continued, history = tiny_clip(seed=9), []
    torch.manual_seed(99)
    summary = run(continued, dataset, pairs, tmp_path, on_step=lambda s, r: history.append(r), on_epoch=measure)
    assert summary["resumed_at_step"] == killed
    for name, value in whole.state_dict().items():
        assert torch.equal(continued.state_dict()[name], value), name
    assert without_rates(history) == without_rates(whole_history)


SCRIPT = textwrap.dedent(
    """
    import pickle, sys, time
    from pathlib import Path
    import torch
    from fast_goal.environment import prepare
    from fast_goal.training.loop import finetune

    prepare()
    folder, threads = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(threads)  # sums are rounded differently with another number
    dataset, pairs, clip, objective, config = pickle.loads((folder / "job.pickle").read_bytes())


    def on_step(step, record):
        print(step, flush=True)
        time.sleep(0.2)


    finetune(clip, dataset, pairs, objective, config, seed=5, device=torch.device("cpu"),
             state_path=folder / "state.pt", state_key="key", on_step=on_step)
    """
)


@pytest.mark.parametrize("settings", [{"epochs": 4}, FULL])
def test_killed_process_continues(make_scenes, tiny_clip, tmp_path, settings):
    dataset, pairs = make_scenes()
    config = replace(CONFIG, log_every=1, save_every=1, **settings)
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "job.pickle").write_bytes(pickle.dumps((dataset, pairs, tiny_clip(), fast_goal(), config)))
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path), str(torch.get_num_threads())]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    while int(process.stdout.readline()) < 4:
        pass
    time.sleep(random.random() * 0.3)  # anywhere in a step or a save: whatever the moment, the end must be the same
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL

    continued, whole, steps = tiny_clip(seed=9), tiny_clip(), []
    summary = run(continued, dataset, pairs, tmp_path, config, on_step=lambda step, record: steps.append(step))
    assert 3 <= summary["resumed_at_step"] < 12
    assert steps == list(range(1, 13))  # the former records first, each once
    (tmp_path / "whole").mkdir()
    run(whole, dataset, pairs, tmp_path / "whole", config)
    for name, value in continued.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name
    assert list(states(tmp_path / "state.pt")) == list(range(12, 12 - config.keep_states, -1))


def test_a_damaged_state_costs_the_steps_since_the_one_before(make_scenes, tiny_clip, tmp_path, caplog):
    dataset, pairs = make_scenes()
    config = replace(CONFIG, save_every=1, **FULL)
    with killed_after(loop_module, 7):
        run(tiny_clip(), dataset, pairs, tmp_path, config)
    newest = states(tmp_path / "state.pt")[7]
    newest.write_bytes(newest.read_bytes()[:-1000])
    continued, whole = tiny_clip(seed=9), tiny_clip()
    assert run(continued, dataset, pairs, tmp_path, config)["resumed_at_step"] == 6
    assert "00000007.pt cannot be read" in caplog.text
    (tmp_path / "whole").mkdir()
    run(whole, dataset, pairs, tmp_path / "whole", config)
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in continued.state_dict().items())


class Losses(Plain):
    """An objective whose loss is given, step by step from 1."""

    def __init__(self, *values):
        self.values, self.step = values, 0

    def __call__(self, features):
        self.step += 1
        return {"loss": 0 * features.image_global.sum() + 0 * features.text_global.sum() + self.values[self.step - 1]}


def test_a_diverged_loss_stops_also_a_resumed_training(make_scenes, tiny_clip, tmp_path):
    dataset, pairs = make_scenes()
    config = replace(CONFIG, diverged=5.0, log_every=1, save_every=1, keep_states=9, epochs=9)
    objective, steps = Losses(2.0, 1.0, 11.0, 12.0, 13.0), []
    with killed_after(loop_module, 4):
        run(tiny_clip(), dataset, pairs, tmp_path, config, objective)
    more = {"on_step": lambda step, record: steps.append(step), "section": "intermediate.training"}
    ids = Loader(PairDataset(dataset, "train", pairs, tiny_clip(), local=False), 4, seed=5).image_ids(4)
    expected = rf"diverged: 13 at step 5.*intermediate\.training\.learning_rate.*Its batch: {', '.join(ids)}\."
    with pytest.raises(FastGoalError, match=expected + r" The last good state is .*state\.00000002\.pt\."):
        run(tiny_clip(), dataset, pairs, tmp_path, config, objective, **more)
    assert steps == [1, 2, 3, 4, 5]  # what led there is recorded


def test_weights_that_are_spoilt_are_not_kept(make_scenes, tiny_clip, tmp_path):
    config = replace(CONFIG, log_every=1000, save_every=1, epochs=9, batch_size=2)
    expected = r"not finite at step 3: .*The last good state is .*state\.00000002\.pt"
    with pytest.raises(FastGoalError, match=expected):
        run(tiny_clip(), *make_scenes(), tmp_path, config, Losses(2.0, 1.0, float("nan"), 1.0))
    assert list(states(tmp_path / "state.pt")) == [2, 1]


def test_weights_that_a_gradient_spoilt_are_not_kept(make_scenes, tiny_clip, tmp_path):
    class Spoilt(Losses):
        def __call__(self, features):
            terms = super().__call__(features)
            if self.step == 3:
                terms["loss"] = terms["loss"] + (0 * features.image_global.sum()).sqrt()  # 0, and its gradient is no number
            return terms

    config = replace(CONFIG, log_every=1000, save_every=1, epochs=9, batch_size=2)
    with pytest.raises(FastGoalError, match=r"weights are not finite after step 3, .*learning_rate.*00000002\.pt"):
        run(tiny_clip(), *make_scenes(), tmp_path, config, Spoilt(2.0, 1.0, 1.0, 1.0))
    assert list(states(tmp_path / "state.pt")) == [2, 1]


def test_batch_without_any_pair_trains_on(make_scenes, tiny_clip, tmp_path):
    dataset, pairs = make_scenes()
    local_only = fast_goal({"global": 0.0, "local": 1.0, "tsl_image": 1.0, "tsl_text": 1.0})
    for objective in (fast_goal(), local_only):
        clip = tiny_clip()
        summary = run(clip, dataset, pairs[:1], tmp_path, replace(CONFIG, epochs=1), objective, state_key=str(id(objective)))
        assert summary["steps"] == 3
        assert all(parameter.isfinite().all() for parameter in clip.parameters())


def test_global_objective_needs_no_pairs_table(make_scenes, tiny_clip, tmp_path):
    dataset, _ = make_scenes()
    summary = run(tiny_clip(), dataset, None, tmp_path, objective=fast_goal(GLOBAL))
    assert set(summary["final"]) == {"global", "loss", "learning_rate", "logit_scale"}


def test_loss_that_is_not_finite_stops_with_advice(make_scenes, tiny_clip, tmp_path):
    dataset, pairs = make_scenes()
    clip = tiny_clip()
    with torch.no_grad():
        clip.model.visual.proj[0, 0] = float("nan")
    with pytest.raises(FastGoalError, match=r"not finite at step 1: .*global = nan.*finetune\.learning_rate"):
        run(clip, dataset, pairs, tmp_path)


def test_fewer_samples_than_a_batch(make_scenes, tiny_clip, tmp_path):
    dataset, pairs = make_scenes(count=3)
    summary = run(tiny_clip(), dataset, pairs, tmp_path, replace(CONFIG, batch_size=64))
    assert summary["steps"] == 2 and summary["batch_size"] == 3


def test_precision_on_a_cpu(make_scenes, tiny_clip):
    assert autocast_dtype("auto", CPU) is None and autocast_dtype("fp32", CPU) is None
    assert autocast_dtype("bf16", CPU) is torch.bfloat16
    dataset, pairs = make_scenes()
    clip = tiny_clip()
    batch = PairDataset(dataset, "train", pairs, clip)[[0, 1, 2]]
    exact, rounded = batch_features(clip, batch), batch_features(clip, batch, torch.bfloat16)
    for name, value in given(rounded, vars(rounded).keys() - {"negative_count", "shares"}).items():
        assert value.dtype == (torch.int64 if name == "local_rows" else torch.float32)
        torch.testing.assert_close(value, getattr(exact, name), atol=0.05, rtol=0)
    assert not torch.equal(rounded.image_global, exact.image_global)


def test_gpu_without_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    gpu = torch.device("cuda")
    assert autocast_dtype("auto", gpu) is None
    with pytest.raises(ConfigError, match=r"finetune\.precision.*Old GPU"):
        autocast_dtype("bf16", gpu)
    with pytest.raises(ConfigError, match=r"intermediate\.training\.precision.*Old GPU"):
        autocast_dtype("bf16", gpu, "intermediate.training")


@pytest.mark.gpu
def test_gpu_trains_in_bfloat16_and_resumes(make_scenes, tiny_clip, tmp_path):
    dataset, pairs = make_scenes()
    gpu = torch.device("cuda")
    records = []
    summary = run(tiny_clip(), dataset, pairs, tmp_path, device=gpu, on_step=lambda step, record: records.append(record))
    assert summary["precision"] == "bf16" and summary["steps"] == 6
    assert 0 < records[0]["gpu_peak_memory_gb"] <= summary["gpu_peak_memory_gb"] < 10
    assert run(tiny_clip(), dataset, pairs, tmp_path, device=gpu)["resumed_at_step"] == 6


@pytest.mark.gpu
def test_a_step_and_its_average_wait_for_no_gpu(make_scenes, tiny_clip):
    (dataset, pairs), gpu = make_scenes(), torch.device("cuda")
    clip = tiny_clip().to(gpu)
    batch = PairDataset(dataset, "train", pairs, clip)[[0, 1, 2, 3]].to(gpu)
    step = TrainStep(clip, fast_goal(), make_optimizer(clip.parameters(), 1e-3, 0.1), torch.bfloat16, 1.0, 100.0)
    average, recorder = Average(clip, 0.5), Recorder("finetune")
    step([batch])  # the first one allocates
    torch.cuda.set_sync_debug_mode("error")
    try:
        recorder.add(1, 4, step([batch]))
        average.update(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert recorder.flush()["loss"] > 0


def test_the_average_is_the_result_and_survives_a_kill(make_scenes, tiny_clip, tmp_path, monkeypatch):
    dataset, pairs = make_scenes()
    config, decay = replace(CONFIG, ema=0.5), 0.5
    seen = []

    class Noted(TrainStep):
        def __call__(self, parts):
            values = super().__call__(parts)
            seen.append({name: value.detach().clone() for name, value in self.clip.named_parameters()})
            return values

    measured = []
    whole = tiny_clip()
    with monkeypatch.context() as patched:
        patched.setattr(loop_module, "TrainStep", Noted)
        measure = lambda clip, epoch: measured.append(copy.deepcopy(clip.state_dict())) or {"val": 1.0}  # noqa: E731
        run(whole, dataset, pairs, tmp_path, config, on_epoch=measure)
    expected = seen[0]
    for weights in seen[1:]:
        expected = {name: decay * expected[name] + (1 - decay) * weights[name] for name in weights}
    for name, value in whole.named_parameters():
        torch.testing.assert_close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}")
        assert torch.equal(value, measured[-1][name])  # what is measured is what results

    (tmp_path / "killed").mkdir()
    with killed_after(loop_module, 4):
        run(tiny_clip(), dataset, pairs, tmp_path / "killed", config)
    continued = tiny_clip(seed=9)
    run(continued, dataset, pairs, tmp_path / "killed", config)
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in continued.state_dict().items())


def test_accumulation_leaves_the_curve_as_it_is(make_scenes, tiny_clip, tmp_path):
    dataset, pairs = make_scenes()
    curves = []
    for parts in (1, 2):
        (tmp_path / str(parts)).mkdir()
        curve, config = [], replace(CONFIG, accumulate=parts, log_every=1)
        run(tiny_clip(), dataset, pairs, tmp_path / str(parts), config, on_step=lambda _, record, to=curve: to.append(record))
        curves.append([[record[name] for name in (*WEIGHTS, "loss")] for record in curve])
    torch.testing.assert_close(torch.tensor(curves[1]), torch.tensor(curves[0]), atol=2e-3, rtol=0)


@pytest.mark.parametrize(("killed", "ema"), [(None, None), (6, None), (9, 0.5)])  # after the best epoch, and after the third
def test_the_best_epoch_can_be_the_result(make_scenes, tiny_clip, tmp_path, killed, ema):
    dataset, pairs = make_scenes()
    config, scores, seen = replace(CONFIG, epochs=4, result="best", ema=ema), [1.0, 3.0, 3.0, 2.0], {}

    def measure(clip, epoch):
        seen[epoch] = copy.deepcopy(clip.state_dict())
        return {"val": scores[epoch - 1]}

    if killed:
        with killed_after(loop_module, killed):
            run(tiny_clip(), dataset, pairs, tmp_path, config, on_epoch=measure)
    clip = tiny_clip()
    summary = run(clip, dataset, pairs, tmp_path, config, on_epoch=measure)
    assert summary["best_epoch"] == 2 and summary["epochs"] == 4
    assert all(torch.equal(value, seen[2][name]) for name, value in clip.state_dict().items())


def test_training_ends_early(make_scenes, tiny_clip, tmp_path):
    dataset, pairs = make_scenes()
    scores = [1.0, 3.0, 2.0, 3.0, 9.0]
    config = replace(CONFIG, epochs=5, patience=2)
    summary = run(tiny_clip(), dataset, pairs, tmp_path, config, on_epoch=lambda clip, epoch: {"val": scores[epoch - 1]})
    assert (summary["epochs"], summary["steps"], summary["best_epoch"]) == (4, 12, 2)
    # its state is still there: nobody saved the model yet
    again = run(tiny_clip(), dataset, pairs, tmp_path, config, on_epoch=lambda clip, epoch: pytest.fail("ran on"))
    assert (again["epochs"], again["resumed_at_step"], again["best_epoch"]) == (4, 12, 2)


@pytest.mark.parametrize(("setting", "value"), [("result", "best"), ("patience", 1)])
def test_a_best_epoch_that_nothing_measures_is_refused(make_scenes, tiny_clip, tmp_path, setting, value):
    with pytest.raises(ConfigError, match=rf"finetune\.{setting} = .* split `val`"):
        run(tiny_clip(), *make_scenes(), tmp_path, replace(CONFIG, **{setting: value}))
    with pytest.raises(ConfigError, match=rf"intermediate\.training\.{setting} = "):
        run(tiny_clip(), *make_scenes(), tmp_path, replace(CONFIG, **{setting: value}), section="intermediate.training")


def test_an_epoch_without_a_number_is_never_the_best(tmp_path):
    history = [{"step": 3, "epoch": 1, "val": float("nan")}, {"step": 6, "epoch": 2, "val": 1.0}]
    assert Best(tmp_path / "best", history, keep=False).epoch == 2


@pytest.mark.parametrize("at", [2, 3, "measuring"])  # within an epoch, after its last step, and after that
def test_sigterm_finishes_the_step_and_writes_the_state(make_scenes, tiny_clip, tmp_path, at):
    dataset, pairs = make_scenes()
    config = replace(CONFIG, log_every=1, save_every=1000)

    def on_step(step, record):
        if step == at and "loss" in record:
            os.kill(os.getpid(), signal.SIGTERM)

    def measure(clip, epoch, stop=False):
        if stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"val": float(epoch)}

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        first = lambda clip, epoch: measure(clip, epoch, at == "measuring")  # noqa: E731
        run(tiny_clip(), dataset, pairs, tmp_path, config, on_step=on_step, on_epoch=first)
    assert stopped.value.code == 143 and signal.getsignal(signal.SIGTERM) is before
    whole, continued, histories = tiny_clip(), tiny_clip(seed=9), ([], [])
    note = lambda history: lambda step, record: history.append(record)  # noqa: E731
    summary = run(continued, dataset, pairs, tmp_path, config, on_step=note(histories[0]), on_epoch=measure)
    assert summary["resumed_at_step"] == (3 if at == "measuring" else at)
    (tmp_path / "whole").mkdir()
    run(whole, dataset, pairs, tmp_path / "whole", config, on_step=note(histories[1]), on_epoch=measure)
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in continued.state_dict().items())
    assert without_rates(histories[0]) == without_rates(histories[1])


def test_a_sigterm_to_all_processes_spares_those_that_decode(make_scenes, tiny_clip, tmp_path):
    config = replace(CONFIG, workers=1, epochs=1000, save_every=10_000)

    def on_step(step, record):
        if step == 4:
            for worker in psutil.Process().children(recursive=True):
                worker.send_signal(signal.SIGTERM)
        if step == 15:  # what was decoded before would not have lasted until here
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit):
        run(tiny_clip(), *make_scenes(), tmp_path, config, on_step=on_step)
    assert max(states(tmp_path / "state.pt")) == 15


@pytest.mark.parametrize("parts", [1, 2])
def test_compiled_towers_learn_the_same(make_scenes, tiny_clip, tmp_path, monkeypatch, parts):
    dataset, pairs = make_scenes()
    config = replace(CONFIG, accumulate=parts, ema=0.5, epochs=1, log_every=1)
    compiled, graphs, curves = Clip.compile, [], ([], [])

    def count(module, inputs):
        graphs.append(module)
        return module

    # what dynamo makes of the towers, without the minutes of a C++ compiler
    monkeypatch.setattr(Clip, "compile", lambda clip: compiled(clip, backend=count))
    for on, curve in zip((False, True), curves, strict=True):
        (tmp_path / str(on)).mkdir()
        measure = lambda clip, epoch: {"val": clip.encode_image(torch.ones(2, 3, 32, 32)).sum().item()}  # noqa: E731
        note = lambda _, record, to=curve: to.append(record.get("loss", record.get("val")))  # noqa: E731
        run(tiny_clip(), dataset, pairs, tmp_path / str(on), replace(config, compile=on), on_step=note, on_epoch=measure)
    assert 1 <= len(graphs) <= 8  # dynamo gives up beyond
    torch.testing.assert_close(torch.tensor(curves[1]), torch.tensor(curves[0]), atol=2e-3, rtol=0)


def test_lack_of_memory_says_what_to_set(make_scenes, tiny_clip, tmp_path, monkeypatch):
    dataset, pairs = make_scenes()

    def fails(self, parts):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(TrainStep, "__call__", fails)
    with pytest.raises(FastGoalError, match=r"4 samples in 1 part.*finetune\.accumulate=2.*finetune\.checkpointing=true"):
        run(tiny_clip(), dataset, pairs, tmp_path)
    with pytest.raises(FastGoalError, match=r"set intermediate\.training\.accumulate=2") as error:
        run(tiny_clip(), dataset, pairs, tmp_path, section="intermediate.training")
    assert "finetune." not in str(error.value)
