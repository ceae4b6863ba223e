"""What the device at hand can do."""

from __future__ import annotations

import dataclasses

import torch

from halfbyte.device import free_bytes, resolve_compute_dtype
from halfbyte.errors import PlanError
from halfbyte.memory.cards import Card, card_of_size, cpu_of, find_card


def card_of(device: torch.device) -> Card:
    """Return what is known of the device."""
    if device.type == "cpu":
        has_bf16 = resolve_compute_dtype("auto", device).dtype == torch.bfloat16
        return cpu_of(host_bytes=free_bytes(device), cores=torch.get_num_threads(), has_bf16=has_bf16)
    properties = torch.cuda.get_device_properties(device)
    try:
        known = find_card(properties.name)
    except PlanError:
        known = card_of_size(properties.total_memory)
    return dataclasses.replace(known, name=properties.name, memory_bytes=properties.total_memory)
