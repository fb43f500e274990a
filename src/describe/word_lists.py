"""Closed lists of words that the rules need: places, mass nouns, what joins names, what templates bring along."""

from __future__ import annotations


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


PREPOSITIONS = _set("in at on near during over under along above beside outside inside through across")
LINKS = _set("and by with v vs versus")  # between names
JOINTS = _set("of de la le du del della di da van von der den")  # within a name
ABBREVIATIONS = _set("st mt dr mr mrs ms no jr sr prof ft lt sgt capt")  # whose full stop ends no sentence
WEEKDAYS = _set("monday tuesday wednesday thursday friday saturday sunday")  # no picture shows them
PLACES = _set(
    "airport alley apartment arena attic backyard balcony bar barn basement bathroom bay beach bedroom cafe camp "
    "campsite carnival castle cathedral cave cemetery church circus city classroom cliff club coast college "
    "concert conference countryside court courthouse courtyard creek deck desert diner dock exhibition factory "
    "fair farm festival forest gallery garage garden gym hall harbor harbour highway hill hospital hotel island "
    "jungle kitchen lab laboratory lake library lobby mall marathon marina market meadow mosque mountain museum "
    "nursery ocean office orchard palace parade park party pier plaza pond pool porch pub rally ranch restaurant "
    "river room runway school sea seaside shop shore shrine stadium station store street studio suburb "
    "supermarket swamp synagogue temple terrace theater theatre town university valley village vineyard waterfall "
    "wedding woods workshop yard zoo"
)
MASS = _set(  # nouns that have no a and no plural
    "air algae art artwork asphalt bacon baggage bark bedding beef beer bread broccoli broth butter cake "
    "camouflage carpet carpeting cash cattle champagne cheese chicken china chocolate clay clothing coal cocoa "
    "coffee concrete corn cotton cream crockery cutlery daylight debris denim dirt dough dust earth electricity "
    "equipment fabric farmland fire firewood flesh flooring flour foam fog foliage food footwear frost frosting "
    "fruit fur furniture garbage garlic gasoline gear glassware gold graffiti grass grassland gravel greenery "
    "hair ham hay headgear honey housing ice icing ink iron ivy jam jewellery jewelry juice junk lace land "
    "laundry lava lead leather lettuce lighting lightning lingerie litter livestock luggage lumber makeup marble "
    "meat merchandise metal milk mist money moonlight moss mud music mustard oil paint paper parsley pasta "
    "pavement people pizza plastic plumbing police pollen popcorn pork pottery rain rice rope rubber rubbish rust "
    "salad salmon salt sand sauce scaffolding scenery seafood seaweed shade shrubbery silk silver silverware skin "
    "sleet smog smoke snow soap soil soup spinach sportswear stationery steam steel straw string sugar sunlight "
    "sunshine sushi swimwear syrup tea text thread timber toast tofu traffic trash turf underwear vegetation "
    "vinegar water weaponry weather wheat wildlife wine wiring wood woodland wool yarn yogurt"
)
UNIQUE = _set("sky ground sun moon horizon ocean sea sunset sunrise")  # those with "the"
ACTIVITIES = _set("fly drive float kick cut shopping")  # that are nouns too, but not in a tag
PLURALS = _set(  # nouns that have no singular
    "people police cattle trousers scissors stairs clothes goggles binoculars tights leggings pajamas pyjamas overalls "
    "headphones pliers tongs slacks sunglasses glasses jeans pants shorts"
)
HUMANS = _set("person adult child man woman athlete")  # more general words that make a noun one for people
# All words that the templates bring along. None says anything about a picture.
NEUTRAL = _set("with along together as well plus there is are also and a an the")
