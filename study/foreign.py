"""Sentences that ask for what no edit of the suites does: what is right for them is the picture as it was. Two lots, one to
train on and one that is kept for the test.
"""

from __future__ import annotations

import random

from .edits import Edit
from .wordings import split

NOUNS = (
    "hat, dog, cat, tree, house, car, person, boat, bird, flower, bridge, chair, table, cup, book, shoe, horse, cake, lamp, "
    "window, door, crown, beard, ball, guitar, robot, mountain, castle, river, ship, train, plane, bicycle, apple, banana, "
    "pizza, bottle, clock, phone, computer, umbrella, dragon, rabbit, fish, bear, lion, snake, spider, butterfly, dress, "
    "shirt, ring, necklace, sword, fence, road, sign, balloon, kite, moustache, tail, wing, glass, plate, fork, bed, sofa"
)
OTHER_NOUNS = (
    "elephant, monkey, scarf, glasses, helmet, tower, truck, pirate, wizard, cookie, pumpkin, mushroom, penguin, owl, tiger, "
    "piano, violin, rocket, astronaut, statue, bench, ladder, bucket, candle, backpack, jacket, tie, mask, tent, cow"
)
FOREIGN_FRAMES = (
    "add a {}",
    "remove the {}",
    "put a {} on the table",
    "draw a {}",
    "make the {} bigger",
    "replace the {} with a {}",
    "move the {} to the left",
    "give it a {}",
    "delete the {} behind the {}",
    "a {} beside the {}",
    "where is the {}",
    "write a poem about a {}",
    "the {} should smile",
    "turn the {} into a {}",
    "more {}",
    "{}",
    "two {} and one {}",
    "insert a small {} at the top",
    "the {} is walking",
)
OTHER_FRAMES = (
    "place a {} in the scene",
    "erase the {}",
    "can you add a {} please",
    "let the {} jump over the {}",
    "a {} should stand next to the {}",
    "make the {} smaller",
    "show me a {}",
    "swap the {} for a {}",
    "who drew this {}",
    "i would like a {}",
)
FOREIGN_SENTENCES = (
    "rotate the picture",
    "zoom in",
    "crop it",
    "rotate it by ninety degrees",
    "make it bigger",
    "make it square",
    "hello",
    "how are you",
    "what is this",
    "tell me a story",
    "what time is it",
    "open the file",
    "save it as a new file",
    "make it a cartoon",
    "draw it as a comic",
    "change the background",
    "remove the background",
    "put it on the beach",
    "write hello on it",
    "add some text",
    "make him smile",
    "close the eyes",
    "cut out the person",
    "a pencil drawing",
    "paint it like van gogh",
    "turn it into a sculpture",
    "make it look old",
    "thank you",
    "yes",
    "no",
    "good morning",
    "the quick brown fox",
    "one two three four",
    "a b c d",
    "123 456",
    "???",
    "...",
    "lorem ipsum dolor sit amet",
    "asdf qwer",
    "xxx yyy zzz",
    "make the head smaller",
    "move it up",
    "shift it to the left",
    "change the pose",
    "let it run",
    "add a frame",
    "make it a video",
    "a different angle",
    "from above",
    "undo",
)
OTHER_SENTENCES = (
    "rotate this image",
    "crop the picture to the face",
    "make it larger",
    "zoom out a little",
    "good evening",
    "who are you",
    "what do you see here",
    "sing a song",
    "make it an oil painting",
    "draw it in the style of picasso",
    "swap the background for a beach",
    "write my name on it",
    "open the mouth",
    "turn the head",
    "view it from below",
    "resize it",
    "play some music",
    "uvwx qqq jkl",
    "987 65",
    "!!!",
)
LANGUAGES = (
    "füge einen hut hinzu",
    "entferne den hund",
    "mache das haus größer",
    "zeichne einen baum",
    "wo ist die katze",
    "guten tag",
    "ajoute un chapeau",
    "supprime le chien",
    "dessine une maison",
    "où est le chat",
    "bonjour tout le monde",
    "agrega un sombrero",
    "quita el perro",
    "dibuja un árbol",
    "hola amigo",
    "aggiungi un cappello",
    "togli il cane",
    "disegna una casa",
    "voeg een hoed toe",
    "teken een boom",
    "dodaj kapelusz",
    "usuń psa",
    "добавь шляпу",
    "убери собаку",
    "нарисуй дом",
    "加一顶帽子",
    "删除这只狗",
    "画一棵树",
    "你好",
    "帽子をかぶせて",
    "犬を消して",
    "こんにちは",
    "모자를 추가해",
    "أضف قبعة",
    "lägg till en hatt",
    "lisää hattu",
    "adicione um chapéu",
    "remova o cachorro",
)
OTHER_LANGUAGES = (
    "setze der frau eine brille auf",
    "lösche das auto",
    "mets des lunettes au chat",
    "efface la voiture",
    "pon gafas al gato",
    "borra el coche",
    "cancella la macchina",
    "verwijder de auto",
    "nakresli dom",
    "удали машину",
    "给猫戴上眼镜",
    "删除汽车",
    "車を消して",
    "자동차를 지워",
    "bir şapka ekle",
    "thêm một chiếc mũ",
    "adaugă o pălărie",
    "tag bilen væk",
)


def foreign(trained_on: bool = True, framed: int = 400, seed: int = 0) -> tuple[str, ...]:
    """Sentences that ask for no edit: nouns in frames (`framed` of them, drawn), sentences, other languages, and silence.
    With `trained_on` false those that are kept for the test: other frames, nouns, sentences and languages.
    """
    frames, nouns = (FOREIGN_FRAMES, NOUNS) if trained_on else (OTHER_FRAMES, OTHER_NOUNS)
    sentences = (*FOREIGN_SENTENCES, *LANGUAGES) if trained_on else (*OTHER_SENTENCES, *OTHER_LANGUAGES)
    chance, names, found = random.Random(f"{seed} {trained_on}"), split(nouns), [""] if trained_on else []
    found += sentences
    while len(found) < framed + len(sentences):
        frame = chance.choice(frames)
        text = frame.format(*chance.sample(names, frame.count("{}")))
        if text not in found:
            found.append(text)
    return tuple(found)


def leaving() -> tuple[Edit, ...]:
    """What leaves the picture alone: nouns in frames, and other sentences with silence; a pair, as every suite has."""
    texts, same = foreign(), lambda x: x
    others = {"", *FOREIGN_SENTENCES, *LANGUAGES}
    return (
        Edit("leave-things", same, tuple(text for text in texts if text not in others)),
        Edit("leave-sentences", same, tuple(text for text in texts if text in others)),
    )
