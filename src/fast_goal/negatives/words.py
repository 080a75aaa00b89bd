"""What the rules know of English words: few closed lists, written by hand and so incomplete.

No thesaurus installs from a package index. What may take a word's place is therefore learnt from the captions
(`vocabulary.py`), and these lists say what may not: words that mean nearly the same, and kinds with what is one of them.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations, product


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


COLOURS = _set(
    """
    red orange yellow green blue purple pink brown white black gray grey beige tan cream khaki silver gold golden
    bronze copper maroon burgundy crimson scarlet violet lavender magenta lilac cyan turquoise teal aqua navy mint
    lime olive peach coral salmon ivory charcoal amber rose
    """
)
SIZES = _set("large big huge giant enormous massive small little tiny miniature medium medium-sized mid-sized")
PATTERNS = _set("striped dotted spotted checkered plaid plain floral wavy zigzag patterned solid")
SHAPES = _set("round circular square rectangular triangular oval oblong hexagonal octagonal star-shaped curved")
MATERIALS = _set(
    """
    wooden wood metal metallic plastic glass concrete cement brick stone leather paper cardboard rubber fabric cloth
    ceramic steel iron marble tile
    """
)
PLACES = _set("left right top bottom upper lower front back rear")
# of these a word is replaced by one of its own, and trades places with one of its own
ADJECTIVE_CLASSES = {
    "colour": COLOURS, "size": SIZES, "pattern": PATTERNS, "shape": SHAPES, "material": MATERIALS, "place": PLACES,
}  # fmt: skip

# Nouns that say where in the picture something is, and what the whole is called. They are not things shown.
PLACE_NOUNS = _set("left right top bottom foreground background")
PICTURE_NOUNS = _set(
    """
    image picture photo photograph photography shot view scene frame drawing painting illustration close close-up
    closeup angle side corner middle center centre edge end part portion area section half quarter third way rest
    bit lot kind type sort set pair piece row group number couple bunch series distance direction front back inside
    outside place position shape color colour shade tone size background foreground daytime nighttime day night time
    thing object something other one each all viewer camera perspective surface line eye-level level area region space
    spot surroundings detail amount variety style format quadrant
    """
)
# Of these, the picture as a whole: what is said of them is how and when it was taken, not what it shows.
VIEWS = _set(
    """
    image picture photo photograph photography shot view scene close-up closeup angle perspective daytime nighttime day night
    dusk dawn
    """
)
# Adjectives that hardly any picture contradicts, or that change what the words around them mean.
VAGUE = _set(
    """
    visible seen other same different various several many few more most less least much own certain such similar
    overall main next last first second third single only entire whole full partial possible able close further far
    near due like nice beautiful pretty real typical usual common regular normal standard simple very additional
    another both each every some any no all half multiple numerous countless sized shaped colored coloured toned styled themed
    upward upwards downward downwards sideways angled aerial overhead
    """
)
# Of each pair the one is never true with the other; where a word is in several, its opposite is that of the first.
_PAIRS = """
left right, top bottom, upper lower, front back, foreground background, day night, indoor outdoor, open closed, old new,
wet dry, clean dirty, full empty, light dark, bright dark, tall short, long short, wide narrow, thick thin, high low,
smooth rough, vertical horizontal, soft hard, straight curved, sunny cloudy, lit unlit, shallow deep, male female, young old,
natural artificial, shiny dull, modern old, cold hot, flat curved, sharp blunt, transparent opaque
"""
OPPOSITES: dict[str, str] = {}
for _one, _other in (pair.split() for pair in _PAIRS.split(",")):
    OPPOSITES.setdefault(_one, _other)
    OPPOSITES.setdefault(_other, _one)

# No word of a line replaces another of it: they mean nearly the same, or the one is a kind of the other.
_NEARLY_THE_SAME = """
gray grey silver charcoal
purple violet lavender lilac magenta mauve
blue navy aqua cyan turquoise teal sky-blue
green lime olive teal mint turquoise
red maroon burgundy crimson scarlet
pink magenta salmon coral rose peach
orange amber peach coral copper
brown tan bronze copper beige khaki
tan cream
white cream ivory beige
yellow gold golden amber
black charcoal dark
large big huge giant enormous massive great
small little tiny miniature mini
medium medium-sized mid-sized
round circular oval rounded curved
square rectangular boxy
dotted spotted polka-dotted speckled
plain solid patternless
checkered plaid patterned
striped wavy zigzag patterned
wooden wood
metal metallic steel iron silver aluminum
concrete cement stone
brick stone
paper cardboard
leather fabric cloth
ceramic tile marble
top upper
bottom lower
back rear
light bright pale sunny
dark dim shaded
tall high long
short low
old worn weathered aged rusty rusted
shiny glossy metallic bright
open wide
man guy male gentleman boy person adult people human individual figure men
woman lady female girl person adult people human individual figure women
child kid boy girl baby toddler person people
people persons crowd men women individuals humans
dog puppy hound animal pet
cat kitten kitty animal pet
horse pony animal
cow bull cattle animal
bird animal pigeon duck seagull sparrow
fish animal
car automobile vehicle sedan suv truck
truck vehicle pickup lorry van
van vehicle bus minivan
bus vehicle
bicycle bike
motorcycle motorbike bike scooter
boat ship vessel canoe kayak
airplane plane aircraft jet
steps stairs stair staircase stairway
sunlight light sun sunshine
logo emblem symbol
pattern design
road street highway asphalt pavement path lane driveway
sidewalk pavement walkway path pathway trail
building house structure tower home skyscraper
fence railing barrier gate
wall side facade
stone rock boulder pebble gravel
dirt soil ground earth mud sand
grass lawn field turf
ground floor earth surface
tree plant bush shrub trunk palm oak
flower plant blossom bloom rose daisy
leaf foliage leaves
plant vegetation greenery
sky cloud clouds air
water sea ocean lake river pond
sea ocean
hill mountain slope
forest woods trees
sofa couch seat
chair seat stool
bench seat
table desk counter
cup mug glass
bowl dish plate
plate dish
bottle jar container
box container crate
bag sack purse backpack
lamp light lantern
picture image photo photograph drawing painting
sign board signage billboard poster
letter word text writing lettering
letters words text writing lettering
number digit numeral
line stripe
shadow shade reflection
hat cap
shirt t-shirt top
pants trousers jeans
coat jacket
shoe sneaker boot
window glass pane
door doorway entrance gate
roof top
pole post column
stick branch twig
branch twig limb
rope string cord
cord wire cable
statue sculpture figurine figure
toy doll figurine
cloth fabric blanket towel
rug carpet mat
circle ring disc
star asterisk
moon crescent
cross plus
cup mug
drop droplet
bolt lightning
diamond rhombus
color colour
"""
SAME = frozenset(frozenset(pair) for line in _NEARLY_THE_SAME.split("\n") for pair in combinations(line.split(), 2))
_NEAR: dict[str, set[str]] = {}
for _one, _other in map(tuple, SAME):
    _NEAR.setdefault(_one, set()).add(_other)
    _NEAR.setdefault(_other, set()).add(_one)

_SINGULARS = {
    "men": "man", "women": "woman", "children": "child", "people": "person", "leaves": "leaf", "shelves": "shelf",
    "feet": "foot", "geese": "goose", "mice": "mouse", "knives": "knife", "loaves": "loaf", "wolves": "wolf",
}  # fmt: skip

NEGATIONS = _set("no not n't n’t without any never neither nor cannot")

# Between two phrases they make a sentence that means the same the other way round.
SYMMETRIC = _set(
    """
    and or nor with near next to beside besides by alongside against touching meets is are was were being like also
    both each another other the a an , & together between opposite connecting meeting
    """
)

_SOUNDED = ("hour", "honest", "honor", "honour", "heir", "herb")  # an h that is not heard
_LIKE_YOU = ("uni", "use", "usu", "eu", "one", "once", "ut", "ubi", "u-")
_NOT_LIKE_YOU = ("unin", "unim", "utt", "uter")


def article(word: str) -> str:
    """`a` or `an`, as the word that follows sounds: a guess from its letters."""
    lower = word.lower()
    if lower.startswith(_SOUNDED):
        return "an"
    if lower.startswith(_LIKE_YOU) and not lower.startswith(_NOT_LIKE_YOU):
        return "a"
    return "an" if lower[:1] in "aeiou8" or lower in ("11", "18") else "a"


def class_of(adjective: str) -> str:
    """The closed class of an adjective, `other` where it is in none."""
    return next((name for name, words in ADJECTIVE_CLASSES.items() if adjective in words), "other")


def forms(word: str) -> frozenset[str]:
    """The word and what it may be the plural of, by its letters: of `boxes` also `boxe`, which no list holds."""
    found = {word, _SINGULARS.get(word, word)}
    for ending, instead in (("s", ""), ("es", ""), ("ies", "y")):
        if word.endswith(ending) and not word.endswith("ss") and len(word) > len(ending) + 2:
            found.add(word.removesuffix(ending) + instead)
    return frozenset(found)


def near(word: str) -> frozenset[str]:
    """The forms of the word, and the listed words that mean nearly the same as one of them."""
    return forms(word).union(*(_NEAR.get(form, ()) for form in forms(word)))


@lru_cache(maxsize=1 << 16)
def akin(first: str, second: str) -> bool:
    """Whether one must not replace the other: the same, of one stem (`stripe`, `striped`), or nearly of one meaning."""
    if any(one == other or frozenset((one, other)) in SAME for one, other in product(forms(first), forms(second))):
        return True
    shorter, longer = sorted((first, second), key=len)
    common = next((place for place, pair in enumerate(zip(shorter, longer, strict=False)) if len({*pair}) > 1), len(shorter))
    return common >= max(3, len(shorter) - 1) or set(first.split("-")) & set(second.split("-")) != set()
