# ruff: noqa: E501 - a template reads best on one line
"""The scripted people of the evaluation: what they type, and what an answer on topic must hold."""

# Three turns each: (what is typed, a pattern that an answer on topic matches, case ignored).
THREE_TURNS: list[list[tuple[str, str]]] = [
    [("hello", r"hello|hi\b"), ("my name is Nadia", r"nadia"), ("what is my name?", r"nadia")],
    [("hey, how are you?", r"fine|well|good|great"), ("I am fine too", r"glad|happy|good|great|wonderful"), ("tell me a joke", r"\?.*[.!]$|why|what")],
    [("what is a block?", r"block|tokens|keys"), ("tell me more", r"block|free|request"), ("and what is a block table?", r"table|list")],
    [("Tell me a story about a fox and a lighthouse.", r"fox.*lighthouse|lighthouse.*fox"), ("what was the name of the fox?", r"fox|called|name|about"), ("what is the moral?", r"that .+")],
    [("what is 7 plus 5?", r"\b12\b"), ("plus 3?", r"\b15\b"), ("thanks!", r"welcome|pleasure|any time|no problem")],
    [("why was my prefix not cached?", r"block|token|salt|evicted"), ("what is a salt?", r"salt|users|hash"), ("why is the last token recomputed?", r"last token|predict|sample")],
    [("I have a dog called Rex", r"dog|rex"), ("what pet do I have?", r"dog"), ("what is my dog's name?", r"rex")],
    [("I live in Oslo", r"oslo"), ("I like swimming", r"swimming"), ("where do I live?", r"oslo")],
    [("who are you?", r"brook|model"), ("what can you do?", r"stor|chat|sum"), ("ok, tell me a story about a dragon", r"dragon")],
    [("why is my stream slow?", r"stream|queue|prompt|others|credit"), ("what is credit?", r"credit|client"), ("how do I cancel a stream?", r"cancel|ctrl")],
    [("how do I start the server?", r"make serve|streamkv serve"), ("do I need a gpu?", r"gpu|cpu|card"), ("which backends are there?", r"torch|cuda")],
    [("I am sad today", r"sorry|pity|nice|story|joke"), ("tell me a story about a kitten and an umbrella", r"kitten.*umbrella|umbrella.*kitten"), ("that was nice", r"thank|glad|another|like")],
    [("what is TTFT?", r"first token"), ("what is ITL?", r"between|inter-token|next"), ("what is throughput?", r"throughput|tokens")],
    [("what is preemption?", r"preempt|blocks"), ("why?", r"victim|cheap|comput|request|blocks"), ("what is copy on write?", r"cop(y|ied)")],
    [("what is the capital of France?", r"not know|more than i know|beyond|sorry"), ("write me a program in python", r"cannot|too hard|larger"), ("what can you do then?", r"stor|chat|sum|help")],
    [("what is your name?", r"brook"), ("why are you so small?", r"small|million|weights"), ("are you human?", r"program|not|model")],
    [("good morning", r"hello|hi\b|morning"), ("I went to the zoo yesterday", r"zoo"), ("what did I just say?", r"zoo")],
    [("I am a teacher", r"teacher"), ("yes, very much", r"nice|good|reason|happy|glad|tell|what|how"), ("what is my job?", r"teacher")],
    [("tell me a story about an owl and a key", r"owl.*key|key.*owl"), ("another one about a robot", r"robot"), ("bye", r"bye|see you")],
    [("what is prefix caching?", r"prefix|blocks|prompt"), ("how are blocks hashed?", r"hash|sha"), ("what is eviction?", r"evict|cached|least|removed")],
]  # fmt: skip

SAMPLES: list[list[str]] = [
    ["hello", "how are you?", "what's your name?", "my name is Lena", "what is my name?", "bye"],
    ["Hi there! What can you do?", "Tell me a story about a fox and a lighthouse.", "Who helped?", "What is the moral?"],
    ["what is a block", "why are there blocks", "what is a block table?", "thanks"],
    ["why was my prefix not cached?", "tell me more", "what is a salt?", "what if the first token differs?"],
    ["tell me a joke", "haha", "another one", "good one, thanks"],
    ["what is 7+5?", "what is 23 + 14", "60 minus 25", "6 times 7"],
    ["why is it slow?", "what is preemption?", "what is TTFT?"],
    ["how do I start the server?", "do I need a GPU?", "how do I chat with you?", "how do I cancel an answer?"],
    ["I have a cat named Mochi", "she is three", "what is my cat called?", "good night"],
    ["tell me a story about a penguin and a telescope", "that was lovely", "another one please"],
    ["I'm bored", "yes please", "what was the name of the hero?"],
    ["who are you?", "are you human?", "how big are you?", "how were you trained?"],
    ["what is the capital of Peru?", "can you write code?", "ok what do you know about StreamKV?"],
    ["I had a bad day", "my boss was angry", "thank you", "tell me something nice"],
    ["I live in Lisbon and I like cooking", "where do I live?", "what did I just ask?"],
    ["What is StreamKV?", "how is it different from vLLM?", "which paper is it based on?", "what is copy on write?"],
    ["Tell me a bedtime story about a little dragon.", "is it true?", "good night, Brook"],
    ["hey", "do you like music?", "I love playing the piano", "what is my hobby?"],
    ["what is a step", "what is prefill", "and decode?", "what is continuous batching?"],
    ["story: robot, garden", "what happened next?", "I liked it", "see you later"],
]
