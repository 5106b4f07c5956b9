"""Tasks: losses, metrics that do not depend on how a split is cut, distillation, the user's own tasks."""

import pytest
import torch

from bar_edge.config import DistillConfig
from bar_edge.errors import InputError
from bar_edge.methods.distillation import distillation_loss, soft_cross_entropy
from bar_edge.training.tasks import UNLABELLED, Classification, Distills, Segmentation, load_task

# methods.md 1.8
STUDENT = torch.tensor([[2.0, 0.0, -1.0]], dtype=torch.float64)
TEACHER = torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64)
LABEL = torch.tensor([0])
EXACT = 1e-9  # the vectors are printed with ten digits


def test_distillation_vector():
    student = STUDENT.clone().requires_grad_()
    task = Classification()
    data_loss = task.loss(student, LABEL)
    soft = task.distill(student, TEACHER, 4.0)
    loss = distillation_loss(data_loss, student, TEACHER, DistillConfig(alpha=0.9, temperature=4.0), task.distill)
    loss.backward()
    assert data_loss.item() == pytest.approx(0.1698460196, abs=EXACT)
    assert soft.item() / 16 == pytest.approx(1.1219700995, abs=EXACT)
    assert loss.item() == pytest.approx(16.1733540340, abs=1e-8)
    expected = torch.tensor([[0.42054394, -0.23378189, -0.18676205]], dtype=torch.float64)
    torch.testing.assert_close(student.grad, expected, rtol=0, atol=1e-8)


def test_distillation_exceeds_kl_by_the_teachers_entropy():
    p, log_q = (TEACHER / 4).softmax(1), (STUDENT / 4).log_softmax(1)
    kl = (p * (p.log() - log_q)).sum()
    entropy = -(p * p.log()).sum()
    assert kl.item() == pytest.approx(0.0298843715, abs=EXACT)
    assert soft_cross_entropy(STUDENT, TEACHER, 4.0).item() == pytest.approx(16 * (kl + entropy).item(), abs=1e-12)


def test_distillation_of_pixels_is_that_of_as_many_images():
    student, teacher = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4)
    as_images = [t.permute(0, 2, 3, 1).reshape(-1, 5) for t in (student, teacher)]
    torch.testing.assert_close(
        Segmentation().distill(student, teacher, 2.0), Classification().distill(*as_images, 2.0), rtol=1e-6, atol=0
    )


def test_distillation_computes_in_float32():
    student, teacher = torch.randn(4, 10), torch.randn(4, 10)
    loss = soft_cross_entropy(student, teacher.bfloat16(), 4.0)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, soft_cross_entropy(student, teacher.bfloat16().float(), 4.0), rtol=0, atol=0)


def accumulated(task, outputs, targets, cuts):
    parts = zip(outputs.tensor_split(cuts), targets.tensor_split(cuts), strict=True)
    return task.value(sum(task.metric(o, t) for o, t in parts))


@pytest.mark.parametrize("cuts", [[], [1], [3, 4], [1, 2, 9]])
def test_accuracy_is_exact_over_unequal_batches(cuts):
    targets = torch.arange(10) % 3
    outputs = torch.nn.functional.one_hot(targets, 3).float()
    outputs[[0, 4, 8]] = outputs[[0, 4, 8]].roll(1, dims=1)
    assert accumulated(Classification(), outputs, targets, cuts) == 0.7


@pytest.mark.parametrize("cuts", [[], [1], [3, 4], [1, 2, 5]])
def test_mean_iou_is_exact_over_unequal_batches(cuts):
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(6, 4, 3, 5, generator=generator)
    targets = torch.randint(0, 4, (6, 3, 5), generator=generator)
    targets[2, 1] = UNLABELLED
    predicted, labelled = outputs.argmax(1), targets != UNLABELLED
    ious = []
    for c in range(4):
        p, t = (predicted == c) & labelled, targets == c
        ious.append((p & t).sum().item() / (p | t).sum().item())
    # the same quotients, added in another order
    assert accumulated(Segmentation(), outputs, targets, cuts) == pytest.approx(sum(ious) / 4, abs=1e-12)


def test_mean_iou_leaves_out_classes_that_do_not_occur():
    targets = torch.tensor([[[0, 1]]])
    outputs = torch.tensor([[0.0, 1.0, 9.0], [9.0, 2.0, 0.0]]).T.reshape(1, 3, 1, 2)
    # class 0: never predicted, 0 of 1; class 1: 0 of 1; class 2: predicted, never there; all three count
    assert Segmentation().value(Segmentation().metric(outputs, targets)) == 0.0
    perfect = torch.tensor([[9.0, 0.0, 0.0], [0.0, 9.0, 0.0]]).T.reshape(1, 3, 1, 2)
    assert Segmentation().value(Segmentation().metric(perfect, targets)) == 1.0


def test_segmentation_loss_ignores_unlabelled_pixels():
    outputs, targets = torch.randn(1, 3, 2, 2), torch.tensor([[[0, 1], [2, UNLABELLED]]])
    changed = outputs.clone()
    changed[..., 1, 1] += torch.tensor([5.0, -5.0, 0.0])
    assert Segmentation().loss(outputs, targets) == Segmentation().loss(changed, targets)


def test_load_task(tmp_path, monkeypatch):
    assert isinstance(load_task("classification"), Classification)
    assert isinstance(load_task("segmentation"), Distills)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_task_of_test.py").write_text(
        "class Own:\n metric_name='m'\n higher_is_better=False\n"
        " def loss(self,o,t): ...\n def metric(self,o,t): ...\n def value(self,c): ...\n"
        "class Half:\n metric_name='m'\n higher_is_better=False\n def loss(self,o,t): ...\n"
        "made = Own()\n"
        "class Needs:\n def __init__(self, x): ...\n"
    )
    own = load_task("own_task_of_test:Own")
    assert own.metric_name == "m" and not isinstance(own, Distills)
    assert load_task("own_task_of_test:made").higher_is_better is False
    with pytest.raises(InputError, match="Half without metric, value"):
        load_task("own_task_of_test:Half")
    with pytest.raises(InputError, match="without arguments"):
        load_task("own_task_of_test:Needs")
    with pytest.raises(InputError, match="Missing"):
        load_task("own_task_of_test:Missing")
    with pytest.raises(InputError, match="classification, segmentation"):
        load_task("detection")
    with pytest.raises(InputError):
        load_task("no_such_module_of_test:Task")
