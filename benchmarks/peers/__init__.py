"""The engines that compare_cpu.py compares, one file per engine."""

from __future__ import annotations

from peers.base import Peer
from peers.llama_cpp import LlamaCpp
from peers.openvino import OpenVINO
from peers.pace import Pace
from peers.portalm import PortaLM
from peers.transformers import Transformers
from peers.vllm import VLLM

PEERS: dict[str, type[Peer]] = {
    peer.name: peer for peer in (PortaLM, LlamaCpp, OpenVINO, VLLM, Pace, Transformers)
}
"""Peers in the order of a round and of the tables."""
