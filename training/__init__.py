"""The recipe of the small story model in `minivllm/assets/`: text in, two Hugging Face folders out.

One command runs all of it: `python -m training.train --text DIR --out DIR`. The engine never imports this package;
it is here so that the weights that ship can be made again, and read about, from nothing but the text.

    text.py       reads the stories and rewrites them as chats
    tokenizer.py  trains the byte-level BPE and writes its chat template
    corpus.py     token ids of every document, packed into windows
    model.py      the plain torch Llama, with the weight names of the Hugging Face layout
    optimizer.py  Muon for the matrices, AdamW for the rest, one schedule
    recipe.py     every number that was chosen, in one place
    loop.py       trains one model, on hard labels or on soft ones
    generate.py   samples many stories at once with a key/value cache
    distill.py    the teachers' stories, and the teachers' opinion of every token
    evaluate.py   validation loss, ensemble loss, greedy agreement
    export.py     the Hugging Face layout
    sample.py     prints samples of an exported folder
    train.py      the command
"""
