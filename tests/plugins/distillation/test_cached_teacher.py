"""The plugin with a teacher's cache: the live teacher's loss, and no teacher."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import toys
from compression_manager import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMismatchError,
    ConfigError,
    prepare_compression,
)
from compression_plugins import (
    DistillationConfig,
    IndexedDataset,
    IntermediateLayersKnowledgeDistillationLossConfig,
    QATConfig,
    SelfKnowledgeDistillationLossConfig,
    TeacherCache,
    TeacherRuntime,
)
from compression_plugins.distillation.sources import CachedTeacher
from toy_teachers import CountingTeacher, begin, criterion

DATA = IndexedDataset(toys.images(24))


@pytest.fixture
def teacher():
    torch.manual_seed(0)
    return toys.ConvNet(6)


@pytest.fixture
def cache(tmp_path, teacher):
    built = TeacherCache(tmp_path / "cache")
    built.build(teacher, DataLoader(DATA, 8))
    return TeacherCache(tmp_path / "cache")


def train(config, *others, epochs=2, state=None):
    """Return the manager and the losses of a training from one start."""
    torch.manual_seed(1)
    model = toys.ConvNet(4)
    manager = prepare_compression(model, [config, *others])
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    manager.track(optimizer=optimizer)
    if state is not None:
        manager.load_state_dict(state)
    losses = []
    for _ in manager.epochs(epochs):
        for _, (inputs, targets, ids) in manager.steps(DataLoader(DATA, 8, shuffle=True)):
            output = model(inputs)
            loss = F.cross_entropy(output, targets)
            loss = manager.on_after_compute_loss(
                inputs, output, loss, target=targets, sample_ids=ids
            )
            loss.backward()
            manager.on_before_optimizer_step()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return manager, losses


@pytest.mark.parametrize("others", [(), (QATConfig(),)], ids=["float", "quantized"])
def test_the_loss_is_the_live_teachers_and_the_teacher_never_runs(others, teacher, cache):
    live = CountingTeacher(teacher)
    _, expected = train(DistillationConfig(live, criterion("KL", 4.0)), *others)
    assert len(live.calls) == len(expected) == 6
    live.calls.clear()
    _, losses = train(
        DistillationConfig(teacher_cache=cache, criterion=criterion("KL", 4.0)), *others
    )
    assert losses == expected
    assert live.calls == []


def test_a_teacher_beside_the_cache_is_compared_with_it(teacher, cache):
    train(DistillationConfig(teacher, criterion("KL"), teacher_cache=cache), epochs=1)
    other = copy.deepcopy(teacher)
    with torch.no_grad():
        other.fc.bias += 1
    with pytest.raises(CheckpointMismatchError, match=r"teacher_cache: .*teacher_sha256"):
        prepare_compression(toys.ConvNet(), [DistillationConfig(other, teacher_cache=cache)])


def test_a_run_goes_on_with_the_live_teacher_or_with_the_cache(teacher, cache):
    cached = DistillationConfig(teacher_cache=cache, criterion=criterion("KL", 4.0))
    live = DistillationConfig(teacher, criterion("KL", 4.0))
    _, whole = train(cached)
    state = copy.deepcopy(train(live, epochs=1)[0].state_dict())
    _, rest = train(cached, state=state)
    assert rest == whole[3:]


def test_another_teacher_is_refused_on_resume(cache):
    other = DistillationConfig(toys.ConvNet(6), criterion("KL", 4.0))
    state = copy.deepcopy(train(other, epochs=1)[0].state_dict())
    cached = DistillationConfig(teacher_cache=cache, criterion=criterion("KL", 4.0))
    with pytest.raises(CheckpointMismatchError, match=r"plugin 'distillation'.*another teacher"):
        train(cached, state=state)


def test_the_loop_has_to_pass_sample_ids(cache):
    manager = begin(prepare_compression(toys.ConvNet(), [DistillationConfig(teacher_cache=cache)]))
    output = manager.model(DATA[0][0].unsqueeze(0))
    with pytest.raises(ConfigError, match=r"'distillation' reads .* needs sample_ids; pass them"):
        manager.on_after_compute_loss(DATA[0][0], output, output.mean())


def test_the_logits_come_to_the_device_of_the_inputs(cache):
    source = CachedTeacher(DistillationConfig(teacher_cache=cache), cache)
    for device in ("cpu", "meta"):
        inputs = torch.empty(2, 1, 8, 8, device=device)
        logits = source.outputs(SimpleNamespace(epoch=0), inputs, sample_ids=torch.tensor([1, 2]))
        assert logits.device.type == device


def test_an_unknown_sample_is_refused(cache):
    manager = begin(prepare_compression(toys.ConvNet(), [DistillationConfig(teacher_cache=cache)]))
    output = manager.model(DATA[0][0].unsqueeze(0))
    with pytest.raises(ConfigError, match="99"):
        manager.on_after_compute_loss(
            DATA[0][0], output, output.mean(), sample_ids=torch.tensor([99])
        )


def test_each_epoch_has_its_augmentation_seed(tmp_path):
    torch.manual_seed(0)
    cache = TeacherCache(tmp_path / "cache")
    teachers = {}
    for seed in (3, 5):
        inputs = torch.cat([item[0].unsqueeze(0) for item in (DATA[i] for i in range(24))]) + seed
        teachers[seed] = inputs
    model = toys.ConvNet(6)
    for seed, inputs in teachers.items():
        batch = (inputs, torch.zeros(24), torch.arange(24))
        cache.build(model, [batch], augmentation_seed=seed)
    config = DistillationConfig(
        teacher_cache=cache, augmentation_seeds=[3, 5], criterion=criterion("MSE")
    )
    student = toys.ConvNet()
    manager = prepare_compression(student, [config])
    manager.on_train_begin()
    for epoch, seed in enumerate([3, 5, 3]):
        manager.on_epoch_begin(epoch)
        manager.on_step_begin(0)
        output = student(teachers[seed])
        loss = manager.on_after_compute_loss(
            teachers[seed], output, output.mean() * 0, sample_ids=torch.arange(24)
        )
        with torch.no_grad():
            expected = 0.5 * F.mse_loss(output, model.eval()(teachers[seed]))
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        manager.on_step_end()
        manager.on_epoch_end()


def test_what_cannot_be_read_is_found_at_prepare(tmp_path, cache, teacher):
    with pytest.raises(
        CheckpointError, match=r"distillation\.teacher_cache: .*augmentation seed 7"
    ):
        prepare_compression(
            toys.ConvNet(), [DistillationConfig(teacher_cache=cache, augmentation_seeds=[0, 7])]
        )
    with pytest.raises(CheckpointError, match="nothing was built"):
        prepare_compression(
            toys.ConvNet(), [DistillationConfig(teacher_cache=TeacherCache(tmp_path / "none"))]
        )
    shard = max((tmp_path / "cache").rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointCorruptError, match="builds again what is damaged"):
        prepare_compression(
            toys.ConvNet(), [DistillationConfig(teacher_cache=TeacherCache(tmp_path / "cache"))]
        )


def test_other_classes_are_found_at_prepare(tmp_path, cache):
    other = TeacherCache(tmp_path / "other")
    other.build(
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 7)), DataLoader(DATA, 8)
    )
    inputs = DATA[0][0].unsqueeze(0)
    prepare_compression(
        toys.ConvNet(), [DistillationConfig(teacher_cache=cache)], example_inputs=inputs
    )
    with pytest.raises(ConfigError, match=r"differ in their classes: \(1, 4\) and \(1, 7\)"):
        prepare_compression(
            toys.ConvNet(), [DistillationConfig(teacher_cache=other)], example_inputs=inputs
        )


@pytest.mark.parametrize("loss", ["KL", "MSE"])
def test_outputs_of_other_dimensions_are_found_at_prepare(tmp_path, loss):
    cache = TeacherCache(tmp_path / "sequences")
    sequences = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Unflatten(1, (16, 4)))
    cache.build(sequences, DataLoader(DATA, 8))
    inputs = DATA[0][0].unsqueeze(0)
    config = DistillationConfig(teacher_cache=cache, criterion=criterion(loss))
    with pytest.raises(ConfigError, match=r"in their shapes: \(1, 4\) and \(1, 16, 4\)"):
        prepare_compression(toys.ConvNet(), [config], example_inputs=inputs)


def test_with_a_recipe(tmp_path, cache):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("plugins: {distillation: {augmentation_seeds: [0, 0]}}")
    manager = prepare_compression(toys.ConvNet(), recipe, teacher_cache=cache)
    assert manager._plugins[0].config.teacher_cache is cache


def test_options_without_a_use_are_refused(cache, teacher):
    itself = SelfKnowledgeDistillationLossConfig([[["conv1", "conv2"]]])
    layers = IntermediateLayersKnowledgeDistillationLossConfig(["conv1"])
    for options, message in (
        ({"teacher_outputs": "caller"}, "teacher_outputs has no use with teacher_cache"),
        ({"teacher_outputs": "ema"}, "teacher_outputs has no use with teacher_cache"),
        ({"teacher_forward": lambda model, inputs: None}, "teacher_forward has no use with teach"),
        ({"teacher_output": "logits"}, "teacher_output has no use with teacher_cache"),
        ({"teacher_runtime": TeacherRuntime("int8")}, "teacher_runtime has no use with teacher_c"),
        ({"criterion": layers}, "watches the teacher's layers, which a cache does not hold"),
        ({"criterion": itself}, "teacher_cache has no use with SelfKnowledge"),
        ({"augmentation_seeds": []}, "augmentation_seeds must be a list of at least one"),
        ({"augmentation_seeds": ["a"]}, r"augmentation_seeds\[0\] must be an integer"),
    ):
        with pytest.raises(ConfigError, match=message):
            DistillationConfig(teacher_cache=cache, **options)
    with pytest.raises(ConfigError, match="teacher_cache must be of type TeacherCache or None"):
        DistillationConfig(teacher, teacher_cache="runs/cache")
