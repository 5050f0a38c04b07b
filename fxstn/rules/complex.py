"""Complex numbers and Fourier transforms."""

from __future__ import annotations

import torch

from fxstn.ops.reductions import angle_tangent
from fxstn.rules.registry import filled, linear, pointwise, rule, total

linear(torch.real, torch.imag, torch.conj, torch.resolve_conj, torch.view_as_real, torch.view_as_complex)
linear(
    torch.fft.fft,
    torch.fft.ifft,
    torch.fft.rfft,
    torch.fft.irfft,
    torch.fft.fft2,
    torch.fft.ifft2,
    torch.fft.rfft2,
    fresh=True,
)
linear(
    torch.fft.irfft2, torch.fft.fftn, torch.fft.ifftn, torch.fft.rfftn, torch.fft.irfftn, torch.fft.fftshift, fresh=True
)
linear(torch.fft.ifftshift, fresh=True)
pointwise(torch.angle, lambda dx, y, x: angle_tangent(dx, x))


@rule(torch.complex)
def complex_(d, real, imag):
    return torch.complex(real, imag), torch.complex(filled(d.real, real), filled(d.imag, imag))


@rule(torch.polar)
def polar(d, abs, angle):
    y = torch.polar(abs, angle)
    return y, total(
        (d.abs, lambda dr: dr * torch.where(abs == 0, 0, torch.polar(torch.ones_like(abs), angle))),
        (d.angle, lambda da: y * (1j * da)),
    )
