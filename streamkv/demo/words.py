# ruff: noqa: SIM905 - word lists read best as text
"""Word lists that the corpus draws its slots from."""

HEROES = (
    "fox owl bear rabbit mouse cat dog wolf hedgehog squirrel frog turtle penguin otter badger duck "
    "goose hen horse donkey goat sheep lamb pig cow lion tiger elephant monkey giraffe zebra camel "
    "crocodile snake lizard bee ant spider butterfly snail whale dolphin seal crab fish octopus "
    "crow robin sparrow parrot eagle swan bat mole deer moose beaver raccoon panda koala kangaroo "
    "dragon unicorn giant fairy elf dwarf witch wizard ghost mermaid robot knight king queen prince "
    "princess pirate sailor baker farmer painter teacher gardener tailor fisherman shepherd doctor "
    "clown dancer singer inventor astronaut detective librarian postman cook girl boy grandmother "
    "grandfather puppy kitten snowman scarecrow train tractor cloud star kite alien dinosaur shark "
    "monster ninja hero soldier nurse student goblin troll pigeon chicken toad worm"
).split()

PLACES = (
    (
        "lighthouse forest castle village island mountain river lake garden library market bridge harbour "
        "meadow farm cave desert beach school bakery museum tower windmill train station city town park "
        "playground swamp jungle valley hill cottage barn palace theatre circus ship well orchard "
        "workshop kitchen attic cellar lagoon waterfall volcano glacier hotel hospital airport zoo "
        "temple canyon pond moon spaceship planet house tree tunnel office supermarket restaurant church "
        "square street stadium submarine igloo pyramid treehouse rainbow oasis factory prison"
    )
    .replace("train station", "station")
    .split()
)

THINGS = (
    "lantern teapot key map bell clock drum flute violin book letter hat scarf boot coat umbrella "
    "basket bucket ladder mirror ring crown sword shield compass telescope kite balloon bicycle boat "
    "wagon pillow blanket candle spoon cake pie apple pumpkin carrot cookie egg feather shell pearl "
    "stone coin box chest ribbon button needle pencil puzzle ball doll guitar trumpet camera radio "
    "sandwich pancake star seed flower rose banana rocket computer phone pizza chair table "
    "hammer trophy diamond potion wand backpack glove cheese mushroom acorn bone "
    "skateboard train carpet mask toy robot piano snowflake raindrop leaf"
).split()

GIRLS = (
    "Mia Luna Ada Nora Lily Ruby Hazel Ivy Clara Rosa Ella Greta Tilly Maya Pearl Daisy Wren Nina "
    "Olive Poppy Freya Juno Edith Stella Willow"
).split()
BOYS = (
    "Leo Finn Oscar Theo Max Hugo Felix Otto Bruno Jasper Milo Toby Rufus Arlo Ned Gus Henry Louis "
    "Percy Hector Barnaby Victor Samson Eli Jonas"
).split()

USER_NAMES = (
    "Anna Ben Carla David Emma Frank Grace Hannah Ian Julia Kevin Laura Mark Nadia Oliver Paula "
    "Quentin Rachel Sam Tina Umar Vera Will Yara Zoe Alex Bob Chris Dana Eric Fiona George Helen Ivan "
    "Jack Kate Liam Maria Nick Omar Peter Rita Sarah Tom Uma Victor Wendy Yusuf Amir Bella Carlos "
    "Diego Elena Farid Gita Hiro Ines Jonas Kofi Lena Mei Noor Priya Ravi Sofia Tariq Lucy Daniel "
    "Mike John Jane Lisa Paul Steve Karen Linda James Robert Mary Susan Amy Adam Aisha Andrei Bruno "
    "Chloe Dmitri Eva Felix Gabriel Hugo Isabel Jin Katya Leo Marta Nils Olga Pablo Rosa Simon Thea"
).split()

PETS = "dog cat rabbit hamster parrot goldfish turtle horse mouse snake lizard duck hen pony".split()
PET_NAMES = (
    "Biscuit Pepper Max Bella Coco Rocky Luna Daisy Shadow Ginger Peanut Oreo Bruno Molly Simba Tiger "
    "Misty Smokey Waffles Noodle Pickle Ziggy Pumpkin Mochi Rex Fluffy Buddy Sunny Pixel Turbo"
).split()
HOBBIES = (
    "painting|swimming|running|cooking|baking|reading|hiking|gardening|cycling|dancing|singing|"
    "fishing|knitting|climbing|chess|football|tennis|basketball|photography|drawing|skiing|surfing|"
    "yoga|sewing|sailing|pottery|birdwatching|playing the guitar|playing the piano|playing video games|"
    "writing|travelling|camping|skating|board games|astronomy|woodwork|coding"
).split("|")
CITIES = (
    "London Paris Berlin Madrid Rome Vienna Oslo Dublin Lisbon Prague Athens Warsaw Cairo Lagos Nairobi "
    "Mumbai Delhi Tokyo Osaka Seoul Sydney Auckland Toronto Boston Chicago Denver Austin Seattle Lima "
    "Bogota Lyon Milan Munich Zurich Geneva Leeds Bristol Glasgow Istanbul Hanoi Manila Bangkok"
).split()
COLOURS = "red blue green yellow orange purple pink black white brown grey turquoise".split()
FOODS = (
    "pizza|pasta|soup|rice|bread|cheese|chocolate|sushi|curry|salad|pancakes|apples|bananas|noodles|"
    "tacos|dumplings|ice cream|sandwiches|fish|potatoes|tomatoes|strawberries|cake|burgers|falafel|eggs"
).split("|")
JOBS = (
    "teacher nurse doctor student engineer driver cook baker farmer painter writer lawyer plumber "
    "pilot librarian gardener designer programmer builder photographer dentist musician scientist "
    "waiter journalist carpenter"
).split()
TREATS = "honey cake|warm bread|apple pie|berry jam|hot soup|sweet tea|ginger biscuits|plum pudding".split("|")
TRAITS = (
    "curious brave shy clever gentle patient cheerful quiet stubborn careful kind playful proud sleepy clumsy lonely hopeful"
).split()
