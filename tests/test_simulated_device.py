"""The simulated device computes right values, refuses mixes of devices, and counts launches and host waits."""

from __future__ import annotations

import pytest
import torch

from hymba_tune.model.backends import OPERATIONS
from hymba_tune.model.scan import SCAN, selective_scan
from tests.simulated_device import DEVICE, Simulated, as_one_launch, counted, simulated_device, to_device, to_host
from tests.tiny import random_texts, tiny_model


def test_operators_compute_what_they_compute_on_a_cpu() -> None:
    x = torch.randn(3, 4)
    with simulated_device(), counted() as counts:
        moved = x.to(DEVICE)
        result = (moved @ moved.t()).softmax(-1)
        result[:, 0].add_(1)

    expected = (x @ x.t()).softmax(-1)
    expected[:, 0].add_(1)
    assert isinstance(result, Simulated)
    assert result.device == DEVICE
    torch.testing.assert_close(to_host(result), expected)
    assert counts.launches == {"_to_copy": 1, "mm": 1, "_softmax": 1, "add_": 1}
    assert counts.waits.total() == 1


def test_tensors_of_two_devices_do_not_mix() -> None:
    with simulated_device() as device:
        x = torch.ones(2, device=device)
        with pytest.raises(RuntimeError, match=r"add mixes tensors of the device with CPU tensors of shape \(2,\)"):
            x + torch.ones(2)
        assert (x + torch.tensor(1.0)).tolist() == [2, 2]  # a number may be on the CPU


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_each_wait_for_the_device_is_counted(mode: type) -> None:
    with simulated_device() as device, mode():
        x = torch.arange(3, device=device)
        with counted() as counts:
            _ = x * 2, x[1:], x.view(1, 3), x.repeat_interleave(x, output_size=3)
        assert not counts.waits

        asking = {
            "item": lambda: x[0].item(),
            "tolist": lambda: x.tolist(),
            "cpu": lambda: x.cpu(),
            "bool": lambda: bool((x == 0).any()),
            "nonzero": lambda: x.nonzero(),
            "mask": lambda: x[x > 1],
            "repeat_interleave": lambda: x.repeat_interleave(x),
            "tensor": lambda: torch.tensor([1, 2], device=device),
            "to": lambda: torch.ones(2).to(device),
            "index on the CPU": lambda: x[torch.tensor([0, 1])],
        }
        for name, ask in asking.items():
            with counted() as counts:
                ask()
            assert counts.waits.total() == 1, name


def test_a_kernel_is_one_launch_with_right_values() -> None:
    u, dt, z = torch.randn(3, 4, 8)
    A, B, C = -torch.rand(8, 2), torch.randn(4, 2), torch.randn(4, 2)
    expected, _ = selective_scan(u, dt, A, B, C, z=z, backend="torch")
    with simulated_device(), counted() as counts:
        actual, _ = selective_scan(*(x.to(DEVICE) for x in (u, dt, A, B, C)), z=z.to(DEVICE), backend="triton")

    torch.testing.assert_close(to_host(actual), expected)
    assert [counts.launches[kernel] for kernel in ("chunk_ends", "carry", "outputs")] == [1, 1, 1]


def test_a_stand_in_is_one_launch() -> None:
    with simulated_device() as device, counted() as counts:
        x = torch.ones(2, device=device)
        with as_one_launch("kernel"):
            (x * 2).exp().tolist()
    assert counts.launches == {"ones": 1, "kernel": 1}
    assert not counts.waits


def test_the_device_is_gone_after_its_context() -> None:
    triton = SCAN.backends["triton"]
    with simulated_device():
        assert torch.accelerator.is_available()
        assert SCAN.backends["triton"].devices == ("cuda", "simulated")
    assert not torch.accelerator.is_available()
    assert SCAN.backends["triton"] is triton


def test_a_model_computes_what_it_computes_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for operation in OPERATIONS.values():
        monkeypatch.setattr(operation, "chosen", operation._plain.name)
    model = tiny_model()
    ids = random_texts([9])[0][None]
    expected = model(input_ids=ids, labels=ids)
    expected.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()

    with simulated_device():
        to_device(model)
        on_device = ids.to(DEVICE)
        output = model(input_ids=on_device, labels=on_device)
        output.loss.backward()
    assert torch.equal(to_host(output.logits), expected.logits)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(to_host(parameter.grad), gradients[name])
