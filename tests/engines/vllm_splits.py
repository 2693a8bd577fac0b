"""Where vLLM cuts the graph of a model with hooks at two places: of each piece whether it is left
out of CUDA graphs, when the operation is among those that split, and when it is not."""

from __future__ import annotations

import json

import torch
from torch import Tensor
from vllm.compilation.backends import split_graph

from trimtab.engines.at_work import AT_WORK, OPERATION


def model(x: Tensor) -> Tensor:
    x = x * 2
    torch.ops.trimtab.steer(x, None, 0)
    x = x + 1
    torch.ops.trimtab.steer(x, None, 1)
    return x * 3


def pieces(splitting: list[str]) -> list[bool]:
    graphs = []
    AT_WORK.at(["first", "second"])

    def kept(graph: torch.fx.GraphModule, example: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch.compile(model, backend=kept, fullgraph=True)(torch.ones(2, 4))
    torch._dynamo.reset()
    return [item.is_splitting_graph for item in split_graph(graphs[0], splitting)[1]]


if __name__ == "__main__":
    print(json.dumps({"told": pieces([OPERATION]), "not told": pieces(["vllm::attention"])}))
