"""trimtab as a model of lm-evaluation-harness, under the name that its users type:

    python -m trimtab.lm_eval --model trimtab \\
        --model_args pretrained=smollm2-135m-instruct,steering=formal.safetensors@2 --tasks ...
"""

from trimtab.evaluation.harness.model import TrimtabLM, main

__all__ = ["TrimtabLM"]

if __name__ == "__main__":
    main()
