"""The layouts of adapters: how trainers and loaders name the tensors of one and the same adapter, and say its scale.

The normal form is PEFT's. What is read in another layout is brought into it (:mod:`.normal`), and any layout is written
from it (:mod:`.converted`); tensors are renamed, cut and put together as they are read, and never rounded.

    names of tensors --parts, words, naming--> Network --> normal form
                                                  |------> a layout's files   (write)
"""
