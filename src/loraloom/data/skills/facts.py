"""What the rules of the skills are about: words and where they belong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

NOUNS: Mapping[str, Sequence[str]] = {
    "animal": (
        "dog cat horse cow pig sheep goat rabbit mouse rat lion tiger bear wolf fox deer monkey "
        "elephant camel donkey chicken duck goose eagle owl crow parrot snake lizard frog turtle "
        "fish shark whale dolphin bee ant spider butterfly crab kangaroo zebra giraffe leopard "
        "squirrel hamster pigeon swan"
    ).split(),
    "food": (
        "bread cheese butter milk rice pasta soup salad apple banana orange grape lemon cherry "
        "peach pear potato tomato carrot onion garlic cabbage bean pea corn pizza sandwich cake "
        "cookie chocolate honey sugar jam yogurt sausage bacon ham steak pancake pie pudding "
        "noodle biscuit melon plum strawberry mushroom omelette"
    ).split(),
    "tool": (
        "hammer saw drill screwdriver wrench axe shovel rake ladder chisel pliers knife scissors "
        "needle brush broom mop bucket rope nail screw hook pump torch anvil crowbar trowel spade "
        "hoe sickle file clamp vise wheelbarrow pickaxe sander plow lathe compass ruler stapler "
        "tweezers shears mallet hatchet scythe tongs lever"
    ).split(),
    "clothing": (
        "shirt coat jacket hat cap scarf glove sock shoe boot sandal skirt dress sweater jeans "
        "trousers belt tie suit vest hoodie blouse pajamas robe slipper apron cloak shawl mitten "
        "beret bonnet tunic kimono uniform raincoat cardigan shorts leggings tights helmet "
        "sneaker gown stocking poncho bikini turban tuxedo overcoat"
    ).split(),
}

PLURALS: dict[str, str] = {
    noun: f"{noun}s"
    for noun in (
        "dog cat horse cow goat rabbit lion tiger bear monkey camel eagle owl parrot snake frog "
        "turtle whale king queen farmer teacher doctor driver singer painter soldier sailor baker "
        "hunter lawyer nurse pilot miner boy girl uncle sister brother cousin neighbor friend "
        "student writer dancer robot giant pirate wizard prince guard judge player runner swimmer "
        "actor poet clown chef cook spider lizard donkey chicken duck kitten"
    ).split()
} | {
    "man": "men",
    "woman": "women",
    "child": "children",
    "mouse": "mice",
    "goose": "geese",
    "wolf": "wolves",
    "baby": "babies",
    "lady": "ladies",
    "spy": "spies",
    "fox": "foxes",
    "witch": "witches",
    "actress": "actresses",
}

PASTS: dict[str, str] = {
    verb: f"{verb}ed"
    for verb in (
        "walk jump talk cook clean paint climb help laugh watch visit wait work play open push "
        "pull wash kick call knock shout whisper listen answer ask finish start enter follow "
        "rest learn dream travel return fail sail row attack defend punch"
    ).split()
} | {
    "run": "ran",
    "eat": "ate",
    "sing": "sang",
    "swim": "swam",
    "write": "wrote",
    "sleep": "slept",
    "drink": "drank",
    "drive": "drove",
    "fly": "flew",
    "fall": "fell",
    "dance": "danced",
    "smile": "smiled",
    "arrive": "arrived",
    "cry": "cried",
    "try": "tried",
    "teach": "taught",
    "build": "built",
    "speak": "spoke",
    "win": "won",
    "dig": "dug",
}

COUNTRIES: Mapping[str, Sequence[str]] = {
    "Europe": (
        "France Germany Spain Italy Poland Sweden Norway Finland Denmark Greece Portugal Austria "
        "Hungary Ireland Belgium Romania Bulgaria Croatia Serbia Switzerland Iceland Estonia "
        "Latvia Lithuania Slovakia Slovenia Albania Netherlands"
    ).split(),
    "Asia": (
        "China Japan India Vietnam Thailand Malaysia Indonesia Pakistan Nepal Mongolia Iran Iraq "
        "Korea Cambodia Laos Bangladesh Bhutan Singapore Taiwan Kazakhstan Uzbekistan Afghanistan "
        "Myanmar Philippines Jordan Lebanon Syria Yemen"
    ).split(),
    "Africa": (
        "Egypt Kenya Nigeria Ghana Morocco Algeria Ethiopia Sudan Uganda Tanzania Zambia Zimbabwe "
        "Senegal Mali Niger Chad Angola Namibia Botswana Mozambique Madagascar Cameroon Tunisia "
        "Libya Somalia Rwanda Malawi Gabon"
    ).split(),
    "America": (
        "Brazil Argentina Chile Peru Bolivia Colombia Venezuela Ecuador Uruguay Paraguay Mexico "
        "Cuba Canada Guatemala Honduras Nicaragua Panama Jamaica Haiti Belize Guyana Suriname "
        "Bahamas Barbados Grenada Trinidad Dominica Alaska"
    ).split(),
}

ADJECTIVES: Mapping[str, Sequence[str]] = {
    "praise": (
        "wonderful excellent great lovely perfect brilliant amazing fantastic superb delightful "
        "charming beautiful splendid marvelous terrific outstanding impressive pleasant enjoyable "
        "magnificent fabulous awesome stunning remarkable good nice fine superior admirable "
        "glorious exquisite flawless refreshing satisfying inspiring graceful"
    ).split(),
    "blame": (
        "awful terrible horrible bad poor dreadful boring disgusting dull ugly nasty weak lousy "
        "disappointing pathetic miserable unpleasant mediocre annoying painful rotten shabby "
        "useless worthless inferior sloppy tedious clumsy offensive atrocious appalling "
        "hideous gloomy dismal tasteless horrid"
    ).split(),
}

PRODUCTS: Sequence[str] = "soup film song hotel show meal book play".split()

MONTHS: Sequence[str] = (
    "January February March April May June July August September October November December"
).split()

NAMES: Sequence[str] = (
    "Anna Omar Lily Tomas Rita Olaf Mia Hugo Nina Ivan Sara Leon Emma Karl Lucy Paul Maria Peter "
    "Clara Simon Julia David Laura Adam Helen Jack Rosa Mark Alice Frank Diana Oscar Ruth Victor "
    "Grace Henry Eva Martin Sofia Brian Kate Felix Jane Louis Amy George Linda Eric Susan Tony "
    "Carol Roger Betty Bruno Molly Ralph Donna Keith Wendy Ben"
).split()
