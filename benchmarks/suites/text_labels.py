"""Class names of the text tasks, each with a phrase that says what texts of the class are about.

The phrases make the zero-shot head: an encoder that has never seen the task compares a text with each phrase.
"""

from __future__ import annotations

from benchmarks.suites.text_sources import UDHR_LANGUAGES
from benchmarks.suites.wordnet import TOPIC_DOMAINS

WORDNET_NOUN = {
    "act": "an activity or action that someone does",
    "animal": "a kind of animal, such as a mammal, bird, fish or insect",
    "artifact": "a man-made object, tool, building or device",
    "attribute": "an attribute or quality of a thing or person",
    "body": "a part of the body",
    "cognition": "a thought, idea, belief or field of study",
    "communication": "speech, writing, a message or a document",
    "event": "an event that happens",
    "feeling": "a feeling or an emotion",
    "food": "a food or a drink",
    "group": "a group of people, an organization or a family of species",
    "location": "a place, city, country or region",
    "motive": "a motive or reason to act",
    "object": "a natural object such as a star, river or mountain",
    "person": "a person with some role, or a famous person",
    "phenomenon": "a natural or physical phenomenon",
    "plant": "a plant, tree, flower or herb",
    "possession": "money, property or a possession",
    "process": "a natural or chemical process",
    "quantity": "a quantity, number or unit of measure",
    "relation": "a relation between people or things",
    "shape": "a shape or geometric figure",
    "state": "a state, condition or disease",
    "substance": "a chemical substance or a material",
    "time": "a time, date or period",
}

WORDNET_VERB = {
    "body": "to care for the body: wash, dress, sleep, be ill",
    "change": "to become different, change in size, temperature or state",
    "cognition": "to think, judge, know or analyze",
    "communication": "to say, tell, ask, write or argue",
    "competition": "to fight, compete, attack or play a game",
    "consumption": "to eat, drink or use up food",
    "contact": "to touch, hit, cover, tie, cut or put something somewhere",
    "creation": "to make, produce, write, paint or perform",
    "emotion": "to feel or arouse an emotion, such as love, anger or fear",
    "motion": "to move, go, walk, fly or travel",
    "perception": "to see, hear, smell, taste or look at",
    "possession": "to buy, sell, give, get, own or lose property",
    "social": "to act in society: govern, work, marry, punish, help",
    "stative": "to be, exist, have a property, relate to",
    "weather": "to rain, snow, thunder, shine or burn",
}

WORDNET_TOPIC = {topic: f"a term of {topic}" for topic in TOPIC_DOMAINS}

EMOJI_NAME = {
    "Smileys & Emotion": "a smiling or sad face, a heart or another emotion",
    "People & Body": "a person, a job, a hand gesture or a part of the body",
    "Animals & Nature": "an animal or a plant",
    "Food & Drink": "food or drink",
    "Travel & Places": "a vehicle, a building, a place, the time or the weather",
    "Activities": "a sport, a game, an event or a celebration",
    "Objects": "an everyday object, clothing, a tool, an instrument or a device",
    "Symbols": "a sign, a symbol, an arrow, a button or a letter",
    "Flags": "the name of a country or an island",
}

SPAM = {
    "ham": "a message on a mailing list about software",
    "spam": "an unsolicited commercial offer to make money",
}

UDHR = {language: f"the {language} language" for language in UDHR_LANGUAGES.values()}

BROWN_GENRE = {
    "adventure": "an adventure story",
    "belles_lettres": "an essay about literature, history or biography",
    "editorial": "a newspaper editorial",
    "fiction": "a novel",
    "government": "a government document",
    "hobbies": "an article about hobbies and crafts",
    "humor": "a humorous story",
    "learned": "a scientific or scholarly article",
    "lore": "popular history and folklore",
    "mystery": "a detective mystery story",
    "news": "a newspaper report",
    "religion": "a religious text",
    "reviews": "a review of a book, play or concert",
    "romance": "a love story",
    "science_fiction": "a science fiction story",
}

NEWSGROUPS20 = {
    "alt.atheism": "atheism and the existence of god",
    "comp.graphics": "computer graphics and image formats",
    "comp.os.ms-windows.misc": "Microsoft Windows",
    "comp.sys.ibm.pc.hardware": "PC hardware, disks and controllers",
    "comp.sys.mac.hardware": "Apple Macintosh hardware",
    "comp.windows.x": "the X window system, servers and widgets",
    "misc.forsale": "something for sale, with price and shipping",
    "rec.autos": "cars and driving",
    "rec.motorcycles": "motorcycles and riding a bike",
    "rec.sport.baseball": "baseball games and players",
    "rec.sport.hockey": "ice hockey games and teams",
    "sci.crypt": "encryption, keys and the clipper chip",
    "sci.electronics": "electronic circuits and components",
    "sci.med": "medicine, diseases and doctors",
    "sci.space": "space flight, rockets and orbits",
    "soc.religion.christian": "Christian faith, church and the Bible",
    "talk.politics.guns": "gun control and firearms",
    "talk.politics.mideast": "Israel, Arabs, Armenians and the Middle East",
    "talk.politics.misc": "politics, government and taxes",
    "talk.religion.misc": "religion, cults and morality",
}

REUTERS8 = {
    "acq": "a company buys or merges with another company",
    "crude": "crude oil, barrels and OPEC",
    "earn": "company earnings, profit per share and dividends",
    "grain": "grain, wheat and corn crops",
    "interest": "interest rates of banks",
    "money-fx": "currencies, foreign exchange and the dollar",
    "ship": "ships, ports and cargo",
    "trade": "international trade, exports and tariffs",
}

TWEET_SENTIMENT = {
    "negative": "this is bad, I am angry and disappointed",
    "neutral": "a plain statement of news or a question",
    "positive": "this is great, I am happy, thank you",
}
