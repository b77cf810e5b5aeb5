"""Peaks of devices, by the names that JAX gives them."""

import types

import pytest

from llama_jax.train import peak as peaks
from llama_jax.train.peak import datasheet, measured_matmul, peak_flops


@pytest.mark.parametrize(
    'kind, teraflops',
    [
        ('TPU v4', 275),
        ('TPU v5 lite', 197),
        ('TPU v5e', 197),
        ('TPU v5', 459),
        ('TPU v5p', 459),
        ('TPU v6 lite', 918),
        ('TPU v6e', 918),
        ('TPU7x', 1153.5),  # 2,307 a chip, which is two devices
        ('NVIDIA A100-SXM4-80GB', 312),
        ('NVIDIA A100-PCIE-40GB', 312),
        ('NVIDIA A100 80GB PCIe', 312),
        ('NVIDIA A10', 125),
        ('NVIDIA A10G', 70),
        ('NVIDIA L4', 121),
        ('NVIDIA L40', 181.05),
        ('NVIDIA L40S', 362.05),
        ('NVIDIA GeForce RTX 4090', 165.2),
        ('NVIDIA H100 80GB HBM3', 989.4),
        ('NVIDIA H100 PCIe', 756),
        ('NVIDIA H100 NVL', 835.5),
        ('NVIDIA H200', 989.4),
        ('NVIDIA H200 NVL', 835.5),
        ('NVIDIA GH200 480GB', 989.4),
        ('NVIDIA GH200 144G HBM3e', 989.4),
        ('NVIDIA B200', 2250),
        ('NVIDIA B300 SXM6 AC', 2250),
        ('NVIDIA GB200', 2500),
    ],
)
def test_the_peak_of_a_device(kind, teraflops):
    device = types.SimpleNamespace(device_kind=kind, platform='gpu')
    peak, source = peak_flops(device)
    assert peak == pytest.approx(teraflops * 1e12, rel=1e-6)
    assert source == f'datasheet of {kind}, dense bfloat16'


@pytest.mark.parametrize(
    'kind',
    [
        'NVIDIA H100',  # of three kinds, from 756 to 989 TFLOP/s
        'NVIDIA H100 80GB HBM3 MIG 1g.10gb',
        'NVIDIA A100-SXM4-40GB MIG 1g.5gb',
        'NVIDIA H20',
        'NVIDIA A10M',
        'NVIDIA GeForce RTX 4090 D',
        'NVIDIA GeForce RTX 4090 Laptop GPU',
        'TPU v3',
        'cpu',
    ],
)
def test_a_device_like_a_known_one_has_no_peak(kind):
    assert datasheet(kind) is None
    told = peak_flops(types.SimpleNamespace(device_kind=kind, platform='gpu'))
    assert told == (None, f'no peak is known for {kind}')


def test_a_product_is_measured_by_its_quickest_repeat(monkeypatch):
    clock = iter([0.0, 2.0, 5.0, 5.5, 6.0, 7.0])
    monkeypatch.setattr(peaks.time, 'perf_counter', lambda: next(clock))
    assert measured_matmul(size=16, repeats=3) == 2 * 16**3 / 0.5
    with pytest.raises(StopIteration):
        next(clock)


def test_virtual_devices_share_a_processor(monkeypatch):
    monkeypatch.setattr(peaks, 'measured_matmul', lambda: 8e9)
    monkeypatch.setattr(peaks.jax, 'local_device_count', lambda: 4)
    cpu = types.SimpleNamespace(device_kind='cpu', platform='cpu')
    assert peak_flops(cpu) == (2e9, 'float32 matrix product of 2048^3 measured at start')
