# ruff: noqa: E501 - a template reads best on one line
"""The beats of the stories. ``<he>`` is the hero's pronoun, ``<hhe>`` the helper's."""

Plot = tuple[list[list[str]], str]

OPENINGS = [
    "Once upon a time there {was|lived} <a_trait> <hero> {called|named} <name>.",
    "Long ago, {when the winters were long|before there were roads|when the world was quieter}, there lived <a_hero> named <name>.",
    "There once was <a_hero> called <name>, and everyone knew <him> as the most <trait> <hero> {for miles around|in the land}.",
    "<name> was <a_trait> <hero> with {bright eyes|a warm smile|a good heart|a loud laugh|a great many questions}.",
    "This is the story of <name>, <a_trait> <hero> who {loved a good adventure|never gave up|liked to look at the stars|always asked why}.",
    "One {spring|summer|autumn|winter} {morning|evening}, <a_hero> named <name> woke up with an idea.",
]

CLOSINGS = [
    "And {so|that is how} <name> learned that <moral>. The end.",
    "From that day on, <name> {never forgot|always remembered} that <moral>.",
    "{When people asked|If you ask} <name> about it {today|now}, <he> {smiles|laughs} and says that <moral>. The end.",
    "And the <helper> and the <hero> {stayed|remained} friends for {the rest of their days|many years}, because both of them knew that <moral>.",
    "That night <name> {slept well|fell asleep with a smile}, and {in the morning|the next day} <he> told everyone that <moral>. The end.",
]

_MEET = [
    '{Just then|At that moment|A little later} <he> met <a_helper> called <helper_name>. "{Why do you look so sad|What is the matter|Can I help you}?" asked <helper_name>. <name> told <hhim> everything, {from the beginning to the end|and left nothing out}.',
    '{Along the way|On the path} sat <a_helper>. "My name is <helper_name>," said the <helper>. "You look {tired|worried|lost}. Sit down and {share some <treat> with me|tell me about it}." So <name> sat down and told <hhim> the whole story.',
    '<name> was about to {give up|turn back|cry} when <a_helper> came by. It was <helper_name>, who {knew every path|was known for good advice|had seen many strange things}. "Two heads are better than one," said <helper_name>. "Let us think about it together."',
]

_THANKS = [
    "<name> thanked <helper_name> {with all <his> heart|again and again}, and they shared some <treat> {under a tall tree|by the fire|while the sun went down}.",
    '"I could not have done it without you," said <name>. <helper_name> {laughed|smiled} and said, "That is what friends are for." Then they {ate <treat>|sang a song|danced in a circle} until it was dark.',
    "They were so happy that they {danced|laughed|sang} all the way home, and there they ate <treat> until they could eat no more.",
]

_SEE_PLACE: Plot = (
    [
        [
            "More than anything, <name> wanted to see the <place>. <He> had heard {travellers|the old people|the birds} talk about it, and every night <he> dreamed of it.",
            'All <his> life <he> had wished to visit the <place>. "One day I will go there," <he> said {every morning|to anyone who would listen}, but the road was long and nobody wanted to go with <him>.',
        ],
        [
            "One {bright|cold|windy} morning <he> packed {some <treat>|a small bag|a warm scarf} and set off for the <place>. At first the road was easy and <name> whistled as <he> walked.",
            'So <name> {put on <his> best hat|packed a little bag} and said goodbye to the neighbours. "I am going to the <place>," <he> told them. Some laughed, but <name> only waved and walked on.',
        ],
        [
            "Then the {rain|fog|snow} came. <He> could not see the path any more, and soon <name> did not know which way the <place> was.",
            "By noon <he> came to a {wide river|deep valley|dark wood}, and there was no {bridge|way around it}. The <place> was on the other side, so near and yet so far.",
        ],
        _MEET,
        [
            '"The <place>? I know a secret way," said the <helper>. "But we must go slowly, and you must {trust me|hold on to me|be very quiet}." <name> was {afraid|nervous}, but <he> nodded and followed, one small step at a time.',
            '<helper_name> thought for a while. "I cannot carry you," <hhe> said, "but I can show you how to {read the wind|follow the stars|listen to the water}." <name> tried and failed, and tried again, and at last <he> understood.',
        ],
        [
            "When the {sun|moon} came up, there it was: the <place>, {bigger|more beautiful|quieter} than in any dream. <name> stood still and could not say a word.",
            "At last they saw the <place> {shining in the light|right in front of them}. <name> ran the last few steps, {laughing|with <his> heart beating fast}. It was even better than <he> had imagined.",
        ],
        _THANKS,
    ],
    "{a long road is short with a friend|every journey begins with one small step|it is never too late to follow a dream}",
)

_SAVE_PLACE: Plot = (
    [
        [
            "<name> lived {close to|right beside|not far from} the <place>, and <he> loved it more than any other place in the world.",
            "Every day <name> looked after the <place>. <He> swept the {stones|path|leaves}, greeted the visitors and made sure that everything was in order.",
        ],
        [
            "But one {night|evening} a {terrible storm|great wind|heavy rain} came, and by the morning the <place> was {a sad sight|badly damaged|full of mud}. Nobody came to visit any more.",
            "Then, one day, the light went out at the <place>, and everything became dark and cold. {Nobody|No one} knew why, and people began to stay away.",
        ],
        [
            '"I will put it right," said <name>. <He> worked from morning to night, but {one pair of hands was not enough|the work was too hard for one <hero>}. <name> sat down and {sighed|hung <his> head}.',
            '<name> went to ask for help. The first neighbour was too busy, the second was too tired, and the third only shook his head. "Then I will do it alone," said <name>, but <his> voice was very small.',
        ],
        _MEET,
        [
            "The next morning <helper_name> came back with {ten friends|a whole family of helpers|everyone <hhe> knew}. Some carried {wood|stones|water}, some {cooked soup|sang songs}, and <name> showed them what to do at the <place>.",
            '<helper_name> had an idea. "Let us have a party at the <place>," <hhe> said, "and everyone who comes must bring one {nail|brick|lamp}." They wrote the letters together, and on the day of the party {a hundred guests|the whole town} came.',
        ],
        [
            "In three days the <place> was {as good as new|more beautiful than ever}. People came from far away to see it, and all of them wanted to shake hands with the brave <hero>.",
            "When the work was done, the <place> shone {in the evening light|like gold}. Even the neighbours who had said no came to say that they were sorry, and <name> forgave them.",
        ],
        _THANKS,
    ],
    "{many hands make light work|there is no shame in asking for help|what we care for together lasts longest}",
)

_MYSTERY: Plot = (
    [
        [
            "One night <name> heard a strange {sound|song|knocking} coming from the <place>. It went on and on, and {nobody could sleep|no one dared to go and look}.",
            "For a week there had been a strange {light|noise} at the <place>. The neighbours said that it was {haunted|full of ghosts}, but <name> did not believe in such things.",
        ],
        [
            '"I will find out what it is," said <name>. <He> took a {lamp|warm coat|long rope} and walked to the <place> all alone, although <his> knees were shaking.',
            "So <name> waited until it was dark and went to the <place>. {Every shadow looked like a monster|The wind howled}, but <he> kept walking.",
        ],
        [
            'Inside it was so dark that <he> could see nothing at all. The sound came closer. "Who is there?" {called|whispered} <name>, and the answer was {a long, sad sigh|a tiny sneeze|a soft sob}.',
            'When <he> came to the <place>, the noise stopped. <name> held <his> breath. Then, from behind {an old door|a big stone|a pile of leaves}, came {a small voice|a quiet sob}: "Please do not hurt me."',
        ],
        [
            'It was <a_helper>! "I am <helper_name>," said the <helper>. "I came to the <place> to find {shelter|a quiet bed}, but now I {cannot find the way out|have hurt my foot}, and every night I call for help."',
            '<name> lifted <his> lamp and saw <a_helper>, {shivering with cold|no bigger than a shadow}. "My name is <helper_name>," the <helper> said. "I only make noise because I am lonely. Everyone runs away from me."',
        ],
        [
            '<name> began to laugh, because <he> was so relieved. "So you are our ghost!" <he> said. <He> gave <helper_name> <his> {coat|scarf} and some <treat>, and they talked until the morning.',
            '"You poor thing," said <name>. "Come home with me. There is a warm fire and plenty of <treat>." <helper_name> could hardly believe it, for nobody had ever been so kind to <hhim>.',
        ],
        [
            "The next day <name> told the neighbours what <he> had found at the <place>. At first they were ashamed, and then they {laughed too|brought blankets and soup}. Soon <helper_name> had more friends than <hhe> could count.",
            "From then on the two of them looked after the <place> together. On quiet nights they {told ghost stories|sang songs}, and nobody was afraid any more.",
        ],
    ],
    "{things are seldom as scary as they sound|a kind word can end any fear|you must look before you judge}",
)

_LOST_THING: Plot = (
    [
        [
            "<He> owned only one treasure: <a_thing>. It had belonged to <his> grandmother, and <name> took it everywhere.",
            "<name> had <a_thing> that <he> loved more than anything else. Every evening <he> {looked at|cleaned} it and put it carefully beside <his> bed.",
        ],
        [
            "But one morning the <thing> was gone. <name> looked under the bed, behind the door and even in the soup pot, but the <thing> was nowhere to be found.",
            "Then, on a {windy|rainy|busy} day, the <thing> {disappeared|was suddenly gone}. <name> searched the whole house from top to bottom, but found only dust and an old sock.",
        ],
        [
            "<He> asked {the crow|the baker|the miller}, and then {the old goat|the postman|the children}, but none of them had seen the <thing>. <name> walked on and on, and it grew late.",
            "<He> followed a line of small footprints {into the woods|across the field|down to the river}. There they stopped, and <name> had no idea where to look next for the <thing>.",
        ],
        _MEET,
        [
            '"I think I have seen your <thing>," said the <helper>. "A {magpie|little child|young goat} was playing with it {by the pond|behind the mill}." They hurried there together, and <helper_name> told jokes on the way, so that <name> would not be sad.',
            '<helper_name> looked closely at the ground. "Think back," <hhe> said. "Where did you last hold the <thing>?" <name> closed <his> eyes and thought, and slowly {the answer|a picture} came to <him>.',
        ],
        [
            "And there it was! The <thing> lay {in the tall grass|in an empty nest|under a bush}, a little {dirty|wet} but not broken. <name> {jumped for joy|laughed out loud} and held the <thing> close.",
            'They found the <thing> {in the arms of a small child|in a nest}, who had {never had a toy|only wanted to borrow it}. <name> was not angry. "Come and visit me," <he> said, "and you may play with the <thing> whenever you like."',
        ],
        _THANKS,
    ],
    "{a treasure is worth more when it is shared|a good friend is the best thing to find|it helps to stop and think before you run}",
)

_MAKE_THING: Plot = (
    [
        [
            "<name> wanted <a_thing> more than anything in the world. But {<he> had no money|there was no shop in the village}, so <he> decided to make one.",
            "Every year there was a great {fair|contest} in the town, and whoever brought the best <thing> won a prize. This year <name> wanted to win it.",
        ],
        [
            "<He> worked all day, but the first <thing> {fell apart|broke in two} as soon as <he> touched it. The second one was {too small|too heavy}, and the third one looked more like a potato.",
            "<name> had never made <a_thing> before. <He> {cut|measured} and {glued|hammered} until late at night, and in the morning the <thing> was so crooked that even the {cat|hen} laughed.",
        ],
        [
            '"I will never learn it," said <name>, and <he> {threw <his> tools into a corner|went outside to be alone}. The sky was grey and so was <his> mood.',
            'The others had {beautiful|perfect} ones already. "Perhaps I should stay at home," thought <name>, and a big tear rolled down <his> cheek.',
        ],
        _MEET,
        [
            '"Show me your <thing>," said <helper_name>. <hHe> turned it around and looked at it from all sides. "It is not bad at all," <hhe> said. "You only went too fast. Try again, {slowly|with patience}, and I will {hold the lamp|keep you company}."',
            '<helper_name> did not laugh. "My first <thing> was even worse," said the <helper>. "I made twenty before one was good." Then <hhe> showed <name> a little trick, and they worked side by side until the stars came out.',
        ],
        [
            "In the morning the <thing> was ready. It was not {perfect|the biggest}, but it was {strong|lovely} and <name> had made it with <his> own hands. Everyone who saw the <thing> wanted to know how it was done.",
            "At last there it was: <a_thing> {so fine that people stopped to look|like no other}. The judges {clapped|nodded}, the children cheered, and <name> {blushed|bowed deeply}.",
        ],
        _THANKS,
    ],
    "{practice is the best teacher|a mistake is only a step on the way|good things take time}",
)

_GIFT: Plot = (
    [
        [
            "One day <he> found <a_thing> {beside the road|on the doorstep|at the bottom of the garden}. It was {old|dusty} and a little strange, and it seemed to {hum|glow} softly.",
            'On <his> birthday <name> got a parcel with no name on it. Inside was <a_thing>, wrapped in {blue paper|dry leaves}, and a note that said: "Use it well."',
        ],
        [
            "<name> soon found out that the <thing> was magic. Whoever held it could {talk to the wind|make flowers grow|hear what others were thinking}. At first <he> used it only for fun.",
            'When <name> touched the <thing>, {a tiny light danced around the room|it began to sing}. "A magic <thing>!" {cried|whispered} <name>. "Now I can have everything I want."',
        ],
        [
            "But the more <he> wished for, the {heavier|darker|colder} the <thing> became. <name>'s friends stopped visiting, because <name> talked only about the <thing>.",
            "<He> wished for cakes, and then for a bigger house, and then for gold. Yet every evening <name> sat alone with the <thing> and did not feel happy at all.",
        ],
        [
            'One cold night <a_helper> called <helper_name> knocked on the door. "I have lost my {home|way} in the storm," <hhe> said. <name> looked at the <thing>. It had power for just one more wish.',
            "Then <he> met <a_helper> named <helper_name>, who was {ill|hungry|very poor} and still shared <hhis> last piece of bread. <name> felt ashamed and thought about the <thing> for a long time.",
        ],
        [
            '<name> did not think twice. "I wish that you are safe and warm," <he> said. The <thing> gave {a bright flash|a happy sound}, and then it was {quiet|just an ordinary <thing>} again. But <helper_name> was smiling, and so was <name>.',
            '"Take it," said <name>, and put the <thing> into <helper_name>\'s hands. At that moment the <thing> began to shine {like the sun|brighter than ever}, because {it worked best when it was given away|that was its true magic}.',
        ],
        [
            "After that, <helper_name> stayed for supper, and then for breakfast, and then for good. They kept the <thing> on the shelf and {looked at it now and then|never needed another wish}.",
            "Soon the old friends came back, one by one. <name> cooked <treat> for everybody, and the <thing> stood in the middle of the table like {a guest|a small lamp}.",
        ],
    ],
    "{giving makes us richer than having|friends are worth more than wishes|the best magic is a kind heart}",
)

PLACE_PLOTS: list[Plot] = [_SEE_PLACE, _SAVE_PLACE, _MYSTERY]
THING_PLOTS: list[Plot] = [_LOST_THING, _MAKE_THING, _GIFT]
