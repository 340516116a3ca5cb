"""What the demo says at its end. Temporary: on the judge of the Twemoji base."""

import torch

from demo.style_judge import DEMO, StyleJudge


BEFORE = {"preferred": 0.05, "recognised": 1.0}  # of the base, as demo/README.md has them


@torch.no_grad()
def preference_report(pipeline) -> str:
    """Several lines, ready to print: the finished pipeline's images against the base's stored figures."""
    captions = (DEMO / "measured_captions.txt").read_text().splitlines()
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for first in range(0, len(captions), 16):
        chunk = captions[first : first + 16]
        generators = [torch.Generator("cpu").manual_seed(first + i) for i in range(len(chunk))]
        images += pipeline(
            chunk, num_inference_steps=25, guidance_scale=2.0, height=64, width=64, generator=generators
        ).images
    judge = StyleJudge.from_pretrained()
    preferred, recognised = judge.preferred_share(images), judge.recognised_share(images, captions)
    return "\n".join(
        [
            f"On {len(captions)} captions that weren't trained on, from the same seeds:",
            f"  in the preferred style (Noto's): {BEFORE['preferred']:.0%} before, {preferred:.0%} after",
            f"  nearest to a drawing of their caption: {BEFORE['recognised']:.0%} before, {recognised:.0%} after",
        ]
    )
