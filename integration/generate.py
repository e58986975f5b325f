"""Greedy tokens and their log-probabilities from a real vLLM, as JSON on the line of stdout that begins with RESULT.

python integration/generate.py MODEL '{"tensor_parallel_size": 2, ...}'
"""

import json
import sys

PROMPTS = [[1, 2, 3, 4, 5], [7, 77, 177, 17, 3, 9, 200, 42], [250, 3]]


def main() -> None:
    from vllm import LLM, SamplingParams

    options = {"dtype": "float32", "max_model_len": 128, "enforce_eager": True, **json.loads(sys.argv[2])}
    # By default vLLM wants 92 % of the memory to be free; these models take a few MB.
    options.setdefault("gpu_memory_utilization", 0.3)
    model = LLM(model=sys.argv[1], skip_tokenizer_init=True, **options)
    sampling = SamplingParams(max_tokens=16, temperature=0, detokenize=False, logprobs=0, ignore_eos=True)
    found = []
    # One by one, so that every run computes in the same batches.
    for prompt in PROMPTS:
        result = model.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)[0].outputs[0]
        chosen = [step[token].logprob for token, step in zip(result.token_ids, result.logprobs, strict=True)]
        found.append([list(result.token_ids), chosen])
    print("RESULT", json.dumps(found))


if __name__ == "__main__":
    main()
