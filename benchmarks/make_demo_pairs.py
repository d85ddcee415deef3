"""Make the preference pairs that the package ships: prompts of ours, answers of the base model.

Rule, which a person sees in the answers: a short plain answer is preferred to a long one. Each
prompt is put to the base model twice: as it is, and with "Answer in one short sentence." after
it. Of the answers to the second the first that is one plain sentence is chosen; of the answers to
the first the longest is rejected, if it is at least three times as long as the chosen one. An
answer that 240 tokens did not end is cut after its last full sentence.

    python benchmarks/make_demo_pairs.py

The answers are SmolLM2-135M-Instruct's (Apache-2.0), so they are often wrong: the pairs teach a
style, not facts.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import set_seed

from qadapter import hub
from qadapter.files import write_text

TOPICS = {
    "What is {}?": "gravity|photosynthesis|inflation|a volcano|jazz|a black hole|yoga|democracy|"
    "an enzyme|chess|origami|compost|a glacier|copper|a sonnet|sourdough|a tariff|electricity|"
    "a comet|coral|an atom|rust|a haiku|fog|a mortgage|a virus|insulin|an eclipse|a compass|"
    "friction|a metaphor|an algorithm|cholesterol|a fossil|meditation|a symphony|a vaccine|"
    "erosion|a budget|caffeine|a tsunami|the stock market|a habitat|plastic|a rainbow|ballet|"
    "the water cycle|an avalanche|osmosis|a constitution|a satellite|pottery|vitamin C|a delta|"
    "a proverb|static electricity|a monsoon|glass|evolution|a password manager|DNA|a strike",
    "How do I {}?": "boil an egg|learn to swim|plant tomatoes|save money|sleep better|tie a tie|"
    "make coffee|train a puppy|write a letter|fix a flat tire|learn guitar|clean a window|"
    "pack a suitcase|start running|make pancakes|read faster|remove a stain|ask for a raise|"
    "stop procrastinating|make new friends|cook rice|sharpen a knife|prepare for an exam|"
    "draw a cat|peel garlic|descale a kettle|wrap a present|build a bookshelf|grow basil|"
    "fold a shirt|ride a bicycle|paint a wall|light a campfire|choose a good book|whistle|"
    "take better photos|remember names|write a poem|store potatoes|iron a shirt|bake bread|"
    "plan a birthday party|water a cactus|unclog a sink|treat a sunburn|change a light bulb|"
    "keep bees|juggle|polish shoes|calm a crying baby",
    "Why {}?": "is the sky blue|do cats purr|do leaves fall|is the sea salty|do we dream|"
    "is bread soft|do birds migrate|is exercise healthy|do people travel|is sleep important|"
    "do we have seasons|do dogs bark|is honey sweet|does ice float|do onions make us cry|"
    "are flamingos pink|do we yawn|does metal rust|is the desert cold at night|do stars twinkle|"
    "do bees dance|is laughter contagious|do we shiver|are bubbles round|does the moon change|"
    "do volcanoes erupt|is water wet|do plants need light|do we blink|is music relaxing|"
    "do magnets attract iron|are plants green|does popcorn pop|do fish have gills|is fire hot|"
    "do spiders spin webs|do we sneeze|is breakfast important|do teeth decay|do tides happen",
    "Give me advice about {}.": "a job interview|moving to a new city|a first date|"
    "buying a used car|public speaking|eating well|working from home|a long flight|budgeting|"
    "learning a language|meeting neighbours|keeping a diary|choosing a bicycle|staying calm|"
    "caring for houseplants|writing an essay|camping in the rain|adopting a cat|saying no|"
    "cooking for one|running a marathon|choosing a laptop|a shared flat|giving feedback|"
    "waking up early|visiting a museum|investing|making a speech at a wedding|hiking alone|"
    "a difficult colleague|apologising|studying at night|painting a room|sending a parcel|"
    "getting over a cold|hosting a dinner|reading to children|buying a mattress|a small garden",
    "Tell me about {}.": "Paris|the Nile|penguins|the Renaissance|Mozart|bicycles|tea|the Sahara|"
    "owls|chocolate|Marie Curie|lighthouses|the heart|bees|Mount Everest|the violin|bamboo|salmon|"
    "the printing press|pyramids|bridges|rainforests|elephants|clocks|windmills|maps|paper|silk|"
    "the Great Wall|dolphins|Shakespeare|cheese|the piano|volcanoes|Iceland|wolves|the telescope|"
    "Antarctica|wool|castles|the Amazon|mushrooms|trains|the Moon landing|butterflies|salt|"
    "Leonardo da Vinci|Japan|octopuses|the alphabet|umbrellas|the Silk Road|apples|submarines|"
    "dinosaurs|Beethoven|coffee|the Olympics|kangaroos|the brain",
    "What should I know before I {}?": "visit Rome|get a dog|start a blog|go skiing|buy a house|"
    "learn to drive|join a gym|start a garden|climb a mountain|change my job|adopt a rabbit|"
    "rent a flat|go sailing|learn the piano|give blood|run a race|bake a cake|travel by train|"
    "start university|become a vegetarian|buy a camera|go camping|learn to cook|write a book|"
    "open a bank account|get a tattoo|cycle to work|keep chickens|learn chess|fly a drone",
    "How does {} work?": "a refrigerator|a bicycle gear|a battery|a microwave|the eye|a compass|"
    "a toilet|a solar panel|a zip|a camera|the lung|a thermometer|a lock|a magnet|an elevator|"
    "a vacuum cleaner|a piano|soap|a parachute|a sundial|a bank|a library|a traffic light|memory|"
    "a jet engine|an umbrella|yeast|a telescope|a search engine|voting|a hearing aid|a kite",
}
SHORT = " Answer in one short sentence."
LISTED = re.compile(r"\n|[*#•:]|\d[.)]|[.!?] ")
SENTENCES = re.compile(r"(.*[^\d][.!?])(?=\s).*", re.DOTALL)


def prompts() -> list[str]:
    """Return the prompts, in a fixed order."""
    return [form.format(x) for form, topics in TOPICS.items() for x in topics.split("|")]


def choose(short: list[str], long: list[str]) -> tuple[str, str] | None:
    """Return the chosen and the rejected answer by the rule above, or None."""
    plain = [a for a in short if a.endswith(".") and not LISTED.search(a) and len(a.split()) > 4]
    rejected = max(long, key=len)
    return (plain[0], rejected) if plain and len(rejected) >= 3 * len(plain[0]) else None


def sample(model: Any, tokenizer: Any, asked: list[str], max_new_tokens: int) -> list[str]:
    """Return one sampled answer a prompt, cut after its last full sentence if it did not end."""
    conversations = [[{"role": "user", "content": text}] for text in asked]
    batch = tokenizer.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        padding=True,
        return_dict=True,
        return_tensors="pt",
        tokenizer_kwargs={"padding_side": "left"},
    )
    out = model.generate(
        **batch, do_sample=True, temperature=0.7, top_p=0.95, max_new_tokens=max_new_tokens
    )
    new = out[:, batch["input_ids"].shape[1] :]
    ended = (new == tokenizer.eos_token_id).any(dim=1).tolist()
    texts = [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    return [t if ok else SENTENCES.sub(r"\1", t) for t, ok in zip(texts, ended, strict=True)]


def main() -> None:
    """Sample, choose, and write `demo.train.jsonl` and `demo.dev.jsonl`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=32, help="prompts at once")
    parser.add_argument("--output", default="src/qadapter/data_files")
    args = parser.parse_args()
    set_seed(args.seed)
    model = hub.load_base(hub.DEFAULT_BASE, dtype=torch.bfloat16)
    tokenizer = hub.load_tokenizer(hub.DEFAULT_BASE)
    rows: list[str] = []
    asked = prompts()
    for start in tqdm(range(0, len(asked), args.batch)):
        part = asked[start : start + args.batch]
        short = sample(model, tokenizer, [p + SHORT for p in part for _ in range(3)], 64)
        long = sample(model, tokenizer, [p for p in part for _ in range(2)], 240)
        for i, prompt in enumerate(part):
            found = choose(short[3 * i : 3 * i + 3], long[2 * i : 2 * i + 2])
            if found is None:
                continue
            chosen, rejected = ([{"role": "assistant", "content": text}] for text in found)
            user = [{"role": "user", "content": prompt}]
            row = {"prompt": user, "chosen": chosen, "rejected": rejected}
            rows.append(json.dumps(row, ensure_ascii=False) + "\n")
    # Every sixth prompt is held out, so that each form of question is in both files.
    held_out = rows[::6]
    train = [row for i, row in enumerate(rows) if i % 6]
    write_text(Path(args.output) / "demo.train.jsonl", "".join(train))
    write_text(Path(args.output) / "demo.dev.jsonl", "".join(held_out))


if __name__ == "__main__":
    main()
