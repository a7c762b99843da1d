"""The many ways in which people ask for the edits of the suites.

For every edit: verbs that take the picture as their object, states that it should be in, and phrases that stand alone. They
are put into frames. Some words and some frames are never trained on: they are the test of paraphrases.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from .edits import BASE_EDITS, Edit

VERB_FRAMES = ("{} the picture", "{} it", "please {} this photo", "{} the whole image")
STATE_FRAMES = ("make it {}", "a {} picture", "i want it {}", "it should look {}")
HELD_OUT_FRAMES = ("could you {} my picture a bit", "can you make this photo {} for me")  # for a verb, for a state
TYPOS = ("wrong", "missing", "swapped")


class Asked(NamedTuple):
    """How one edit is asked for. Words separated by commas."""

    verbs: str
    states: str
    phrases: str
    # never trained on
    other_verbs: str
    other_states: str
    other_phrases: str


ASKED = {
    "brighten": Asked(
        "brighten, lighten, light up, illuminate",
        "brighter, lighter, bright, well lit",
        "more light, increase the brightness, raise the exposure, turn up the lights, add light, it is too dark",
        "brighten up, lighten up",
        "more luminous, less dark",
        "let there be more light, boost the brightness, much too dark",
    ),
    "darken": Asked(
        "darken, dim, shade",
        "darker, dim, dark, gloomy, less bright",
        "less light, lower the brightness, reduce the exposure, turn down the lights, it is too bright, underexpose it",
        "dim down, darken down",
        "dimmer, less lit",
        "decrease the brightness, take away some light, much too bright",
    ),
    "warm": Asked(
        "warm, warm up, heat",
        "warmer, warm, golden, sunny, orange",
        "make it look like a sunset, golden hour light, a warm glow, a summer feeling, warm colours, candle light, "
        "add warmth, an orange tone",
        "make warmer, heat up",
        "more golden, toasty, more orange",
        "a sunset look, late afternoon sun, a warmer tone",
    ),
    "cool": Asked(
        "cool, cool down, chill",
        "cooler, cool, colder, cold, icy, bluish, wintry, frosty",
        "make it look like winter, a cold mood, blue tones, cool colours, an arctic feeling, add a blue tone, moonlight",
        "make colder, freeze",
        "chilly, more blue, chillier",
        "a winter look, a cooler tone, icy cold colours",
    ),
    "saturate": Asked(
        "saturate, intensify",
        "vivid, more vivid, colourful, vibrant, more colourful, saturated",
        "stronger colours, boost the colours, increase the saturation, intense colours, let the colours pop, rich colours, "
        "more colour",
        "enliven, colour up",
        "more saturated, more vibrant",
        "raise the saturation, bolder colours, richer colours",
    ),
    "desaturate": Asked(
        "desaturate, decolour, grey out",
        "gray, grey, black and white, colourless, monochrome, grayscale",
        "remove the colours, no colours, take the colour away, like an old photograph, without colour, less saturation, "
        "a black and white photo",
        "drain, remove colour from",
        "greyscale, uncoloured",
        "an old black and white film, drop all colour, reduce the saturation",
    ),
    "sharpen": Asked(
        "sharpen, focus",
        "sharper, sharp, crisp, crisper, more detailed, clear, in focus",
        "more sharpness, increase the sharpness, clear edges, bring out the details, crisp lines, finer detail, "
        "stronger edges",
        "sharpen up, refocus",
        "clearer, less blurry",
        "boost the sharpness, enhance the details, better focus",
    ),
    "blur": Asked(
        "blur, soften, smear, smooth",
        "blurry, blurred, soft, softer, out of focus, smooth, unsharp, hazy",
        "less sharpness, soft focus, a gentle blur, hide the details, defocus it, a dreamy haze, smooth it out",
        "blur out, smudge",
        "fuzzy, less sharp",
        "out of focus please, lose the details, a soft blur",
    ),
    "contrast": Asked(
        "punch up, add contrast to",
        "punchy, contrasty, dramatic, high contrast",
        "stronger contrast, increase the contrast, deep blacks and bright whites, hard light, a bold contrast",
        "give more contrast to",
        "more contrasty, more dramatic",
        "raise the contrast, boost the contrast",
    ),
    "fade": Asked(
        "fade, wash out, flatten",
        "faded, flat, matte, pale, washed out, low contrast",
        "reduce the contrast, a faded look, a flat look, lower the contrast, lift the blacks",
        "fade out",
        "more faded, less contrasty",
        "decrease the contrast, a pale washed look",
    ),
    "magenta": Asked(
        "tint purple, dye pink",
        "pink, purple, magenta, violet, pinkish",
        "a magenta tint, add pink, a purple tone, pink light, shift it to pink, a violet tint",
        "paint pink",
        "more pink, lilac",
        "add magenta, a pinkish tone",
    ),
    "green": Asked(
        "tint green, dye green",
        "green, greenish, greener, emerald",
        "add green, a green tone, green light, shift it to green, a forest tint, like the matrix",
        "paint green",
        "more green, lime",
        "an emerald tone, a greenish tint",
    ),
    "hue-forth": Asked(
        "",
        "",
        "shift the hue right, hue to the right, rotate colours right, spin the hues up, turn the colours right, move the hue "
        "up, hue forward, next hue, rotate the hues forward, colours to the right",
        "",
        "",
        "push the hue right, cycle colours up, shift the hues forward",
    ),
    "hue-back": Asked(
        "",
        "",
        "shift the hue left, hue to the left, rotate colours left, spin the hues down, turn the colours left, move the hue "
        "down, hue backward, previous hue, rotate the hues backward, colours to the left",
        "",
        "",
        "push the hue left, cycle colours down, shift the hues backward",
    ),
    "vignette": Asked(
        "vignette",
        "dark at the edges, vignetted",
        "darken the corners, a dark border, dark edges, shade the corners, fade the edges to black, a shadow around, dim the "
        "border, black corners",
        "",
        "dark around the border",
        "shadow the corners, darker edges, a vignette effect",
    ),
    "spotlight": Asked(
        "",
        "dark in the middle",
        "darken the centre, a dark middle, bright edges, dark centre and bright border, shade the middle, bright border, "
        "a shadow in the middle, black centre, a hole in the centre",
        "",
        "dark at the centre",
        "shadow the middle, a darker centre, dim the centre",
    ),
    "even": Asked(
        "balance, even out",
        "evenly exposed, balanced",
        "even exposure, normal exposure, fix the exposure, correct the brightness, equal brightness, auto exposure, "
        "medium brightness",
        "normalise",
        "properly exposed",
        "correct exposure, balance the light",
    ),
    "uneven": Asked(
        "",
        "more extreme",
        "extreme exposure, exaggerate the exposure, exaggerate the brightness, push the light, extreme brightness, "
        "amplify the exposure, stretch the brightness",
        "",
        "extremely exposed",
        "exaggerate the light, amplify the brightness",
    ),
    "neutral": Asked(
        "",
        "neutral, natural",
        "neutral colours, correct the colours, fix the white balance, white balance, remove the colour cast, "
        "auto white balance, true colours",
        "white balance",
        "more neutral",
        "neutralise the tint, remove the cast, correct the white balance",
    ),
    "tinted": Asked(
        "",
        "more tinted",
        "stronger tint, boost the main colour, exaggerate the tint, push the colour cast, amplify the tint, increase the "
        "dominant colour, more of the main colour",
        "",
        "strongly tinted",
        "amplify the main colour, push the dominant tint, exaggerate the main hue",
    ),
    "warm-bright": Asked(
        "",
        "",
        "warm up the bright half, golden light and blue shadow, heat the bright side, warm the bright side, "
        "orange light and blue shadow, warm highlights and cool shadows",
        "",
        "",
        "make the bright half warmer, golden highlights and blue shadows",
    ),
    "cool-bright": Asked(
        "",
        "",
        "cool down the bright half, blue light and golden shadow, chill the bright side, cool the bright side, "
        "blue light and orange shadow, cool highlights and warm shadows",
        "",
        "",
        "make the bright half colder, blue highlights and golden shadows",
    ),
    "invert-dark": Asked(
        "",
        "",
        "invert dark photos, turn night into day, negative of the dark photo, invert it if it is dark, dark photos become "
        "negative, from night to day",
        "",
        "",
        "turn the night to day, invert if dark",
    ),
    "invert-bright": Asked(
        "",
        "",
        "invert bright photos, turn day into night, negative of the bright photo, invert it if it is bright, bright photos "
        "become negative, from day to night",
        "",
        "",
        "turn the day to night, invert if bright",
    ),
    "copy": Asked(
        "keep, copy, leave",
        "unchanged, the same, as before",
        "do nothing, no change, change nothing, leave everything alone, no edit, exactly the same picture",
        "preserve",
        "identical",
        "keep everything, do not change anything",
    ),
    "swap": Asked(
        "swap red and blue in",
        "red where it was blue",
        "exchange red and blue, red becomes blue, blue becomes red, switch red and blue, red for blue, trade blue and red",
        "",
        "",
        "interchange red and blue, blue for red",
    ),
    "mirror": Asked(
        "mirror, reflect",
        "mirrored",
        "flip it horizontally, mirror image, swap left and right, left becomes right, flip horizontal, a mirror view",
        "mirror across",
        "reflected",
        "reverse left and right, as in a mirror",
    ),
    "flip": Asked(
        "flip vertically, turn over",
        "upside down, inverted top to bottom",
        "flip it vertically, swap top and bottom, top becomes bottom, stand it on its head, flip vertical, head down",
        "overturn",
        "head over heels",
        "reverse top and bottom, bottom up",
    ),
}


def split(text: str) -> list[str]:
    """Texts that stand between commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def trained(edit: Edit) -> tuple[str, ...]:
    """What is trained on for an edit: its own wordings first, then verbs and states in every frame, and phrases."""
    asked = ASKED[edit.name]
    made = [frame.format(verb) for verb in split(asked.verbs) for frame in VERB_FRAMES]
    made += [frame.format(state) for state in split(asked.states) for frame in STATE_FRAMES]
    return tuple(dict.fromkeys([*edit.wordings, *split(asked.phrases), *made]))


def held_out(edit: Edit) -> dict[str, tuple[str, ...]]:
    """Wordings that are never trained on, by what is new in them: the frame, the words ("synonym"), or a typo."""
    asked, (verb_frame, state_frame) = ASKED[edit.name], HELD_OUT_FRAMES
    frames = [verb_frame.format(verb) for verb in split(asked.verbs)]
    frames += [state_frame.format(state) for state in split(asked.states)]
    synonyms = [VERB_FRAMES[0].format(verb) for verb in split(asked.other_verbs)]
    synonyms += [STATE_FRAMES[0].format(state) for state in split(asked.other_states)]
    synonyms += split(asked.other_phrases)
    typos = [mistyped(text, kind, index) for index, (text, kind) in enumerate(_typed(edit))]
    known = set(trained(edit))
    found = {"frame": frames, "synonym": synonyms, "typo": typos}
    return {kind: tuple(text for text in dict.fromkeys(texts) if text not in known) for kind, texts in found.items()}


def _typed(edit: Edit) -> list[tuple[str, str]]:
    texts = [text for text in edit.wordings + tuple(split(ASKED[edit.name].phrases)[:3]) if text]
    return [(text, TYPOS[index % len(TYPOS)]) for index, text in enumerate(texts)]


def mistyped(text: str, kind: str, seed: int = 0) -> str:
    """The text with one letter of its longest word wrong, missing, or swapped with its neighbour; never its first one."""
    words = text.split()
    place = max(range(len(words)), key=lambda index: len(words[index]))
    word, chance = words[place], random.Random(f"{seed} {text}")
    at = chance.randrange(1, len(word) - 1)
    if kind == "wrong":
        word = word[:at] + chance.choice([c for c in "abcdefghijklmnopqrstuvwxyz" if c != word[at]]) + word[at + 1 :]
    elif kind == "missing":
        word = word[:at] + word[at + 1 :]
    else:
        word = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return " ".join([*words[:place], word, *words[place + 1 :]])


def worded(suite: Sequence[Edit]) -> tuple[Edit, ...]:
    """The suite with all trained wordings."""
    return tuple(edit._replace(wordings=trained(edit)) for edit in suite)


def visual_words() -> tuple[str, ...]:
    """Every word of every wording of every edit, trained or not, in alphabetical order."""
    texts = [" ".join(", ".join(asked).split()) for asked in ASKED.values()]
    texts += [text for edit in BASE_EDITS for text in edit.wordings]
    return tuple(sorted({word for text in texts for word in text.replace(",", " ").split()}))
