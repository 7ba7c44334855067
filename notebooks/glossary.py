# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: tags,-all
#     notebook_metadata_filter: kernelspec,-jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Glossary
#
# The terms of this course in alphabetical order, each in two or three plain sentences, and the
# letters of our shapes. Chapters link here where a term is first used. The road they follow begins
# in [chapter 00](00_tour.ipynb).

# %% [markdown]
# ## Notation
#
# A name such as `keys_BTHK` ends in its shape: one letter for each axis, in order.
#
# | letter | axis | first met in |
# |---|---|---|
# | B | rows of a batch | [chapter 02](02_model.ipynb) |
# | T | positions in time, tokens of a row | [chapter 00](00_tour.ipynb) |
# | D | width: numbers in a token's vector | [chapter 00](00_tour.ipynb) |
# | H | attention heads (query heads) | [chapter 02](02_model.ipynb) |
# | G | key and value heads, G divides H | [chapter 02](02_model.ipynb) |
# | K | numbers in one head, D = H × K | [chapter 02](02_model.ipynb) |
# | V | tokens in the vocabulary | [chapter 00](00_tour.ipynb) |
# | L | layers, that is blocks | [chapter 02](02_model.ipynb) |
# | S | positions looked at (of keys), cached ones too | [chapter 02](02_model.ipynb) |
#
# | symbol | meaning |
# |---|---|
# | x, y | inputs and targets: y at position t is x at position t + 1 |
# | p(y \| x) | the probability the model gives to y after x |
# | log | natural logarithm, so losses are in nats |
# | θ, ∇ | all parameters, and the gradient with respect to them |
# | η | learning rate |
# | τ | temperature |
# | π, π_ref | the policy, and the reference model |
# | r, A | reward and advantage of an answer |
# | ε | a small number: in a norm it prevents division by zero, in clipping it is the width |
# | σ | a singular value in chapter 03, a standard deviation elsewhere |

# %% [markdown]
# ## Terms
#
# ### adamw
#
# An optimizer that keeps two running averages for every parameter, of its gradient and of the
# gradient's square, and divides one by the root of the other. So every parameter moves by about
# the learning rate, however large its gradients are. The W says that weight decay is applied apart
# from the gradient.
#
# ### advantage
#
# How much better an answer was than expected. In GRPO it is the answer's reward minus the mean
# reward of all answers to the same question; a policy gradient makes answers with a positive
# advantage more likely and others less.
#
# ### attention
#
# The part of a Transformer that moves information between positions. Each position compares its
# query with the keys of the positions it may see, turns the scores into weights with a softmax,
# and takes home the weighted mean of their values.
#
# ### autoregressive
#
# Producing a sequence one token at a time, each from all tokens before it. What the model has just
# written becomes part of what it reads next.
#
# ### backward pass
#
# The computation of the gradient, from the loss back through every operation to every parameter.
# It costs about twice as much as the forward pass.
#
# ### base model
#
# A model after pretraining and nothing else. It continues text; it has not yet learned to answer
# in turns.
#
# ### baseline
#
# What a reward is compared with before it is used as a learning signal. It changes nothing on
# average and makes the gradient less noisy. GRPO takes the mean of the group.
#
# ### batch
#
# The examples that one step of training uses. Its gradient is an estimate of the gradient over all
# data: a larger batch makes it less noisy.
#
# ### benchmark
#
# A fixed set of questions with a fixed way of scoring, so that models can be compared. A score
# means something only beside the score of guessing.
#
# ### bits per byte
#
# The loss of a text in bits, divided by the bytes of that text. Unlike the loss per token it does
# not depend on the tokenizer, so that models with different vocabularies can be compared. Lower is
# better.
#
# ### block
#
# One layer of a Transformer: attention, then an MLP, each adding its result to the residual
# stream.
#
# ### byte-pair encoding
#
# A way to build a vocabulary: begin with the 256 bytes, then again and again merge the pair of
# neighbours that occurs most often into a new token. Common words end up as one token and rare
# ones as several; nothing is impossible to write.
#
# ### causal mask
#
# What forbids a position to look at later ones: their scores are set to minus infinity before the
# softmax. Thanks to it one pass trains on all positions of a row at once.
#
# ### chat template
#
# The fixed way in which a conversation is written as tokens, with special tokens where a turn
# begins and ends. Training and chatting must use the same one.
#
# ### checkpoint
#
# The weights of a model and the state of its optimizer, saved at a step. Training goes on from it
# as if it had never stopped.
#
# ### clipping
#
# Limiting a quantity. Gradient clipping scales a gradient down when it is longer than a limit.
# PPO's clipping takes away the reason to move a probability further than a factor of 1 ± ε in one
# update.
#
# ### code point
#
# The number that Unicode gives to a character: 65 for A, 8,364 for €. UTF-8 says which bytes it is
# written with.
#
# ### context length
#
# How many tokens a model can look back on. It is limited by the lengths seen in training and by
# the memory of the cache.
#
# ### continuous batching
#
# Many conversations share each step of the engine. One that is over soon leaves its place (its slot)
# to the next in the queue, so no place waits for the longest answer.
#
# ### core
#
# A score for base models from the DCLM paper: the mean over 22 benchmarks of how far each accuracy
# is on the way from guessing (0) to perfect (1).
#
# ### cross-entropy
#
# The loss of a language model: minus the logarithm of the probability that it gave to the token
# that came. It is the mean surprise, and least where the model's probabilities are the true ones.
#
# ### data parallel
#
# Training on several devices that all hold the same model and each take a part of the batch. Their
# gradients are summed, so that they all make the same step.
#
# ### dead merge
#
# A merge whose token no longer occurs, because later merges have swallowed every occurrence: a step
# on the way to a longer word. Its number and its rows in the model stay.
#
# ### decode
#
# The phase of generation in which tokens are written one at a time. Each step reads all weights
# for a little arithmetic, so memory bandwidth limits it.
#
# ### depth
#
# The number of blocks. In this course it is the one dial: width, heads, learning rates and length
# of training follow from it.
#
# ### embedding
#
# A table with one vector for each token of the vocabulary; a token enters the model by looking up
# its row. Also such a vector itself.
#
# ### entropy
#
# How undecided a distribution is: the mean of −log p. Zero if one token is certain, log V if all
# are equally likely.
#
# ### epoch
#
# One pass over all training data.
#
# ### evaluation
#
# Measuring a model on data that it was not trained on. In this course it is a stage of its own
# after each training stage.
#
# ### finetuning
#
# Training a pretrained model further on less data of the kind one wants. What it learned before is
# the starting point, and some of it can be forgotten.
#
# ### flops
#
# Floating point operations, the usual measure of computing work. Training takes about six for each
# parameter and token: two forward, four backward. Written FLOP/s it is a speed.
#
# ### forgetting
#
# Getting worse at what an earlier stage taught, because the weights move for something else. Mixing
# in some of the old text makes it smaller, and so do small steps.
#
# ### gradient
#
# The direction in which the loss rises fastest: one number for each parameter, its derivative.
# Training goes the other way.
#
# ### gradient accumulation
#
# Adding up the gradients of several micro-batches before one step, for a batch that does not fit
# in memory. Right only if the losses are summed and divided once, by the number of all targets.
#
# ### greedy decoding
#
# Always choosing the most probable token. It gives the same answer each time, and is the limit of
# sampling at temperature zero.
#
# ### grouped-query attention
#
# Attention in which several query heads share one key and value head. The cache becomes smaller by
# that factor.
#
# ### grpo
#
# Group relative policy optimization: sample several answers to each question, reward them, and use
# reward minus the group's mean as the advantage. No second network has to estimate how good an
# answer should have been.
#
# ### head
#
# Of attention: one of several that work side by side, each with its own queries, keys and values.
# Of the model: the last matrix, which turns a vector into a score for each token.
#
# ### induction head
#
# An attention head that finds an earlier place where the present token stood and copies what
# followed it. It is how a model repeats a pattern it has seen only once.
#
# ### inference
#
# Using a model rather than training it.
#
# ### key
#
# The vector by which a position is found: other positions compare their queries with it.
#
# ### kl divergence
#
# How far one distribution is from another: the mean, under the first, of the difference of their
# log-probabilities. It is zero only if they are equal, and it is not symmetric. As a penalty it
# keeps a policy near its reference model.
#
# ### kv cache
#
# The keys and values of all tokens so far, kept so that the next token needs only its own. It
# trades memory for time and must change no result.
#
# ### language model
#
# A function that gives every token of a vocabulary a probability of coming next, given the tokens
# so far.
#
# ### learning rate
#
# How far a step goes. Too large and training diverges, too small and it takes for ever.
#
# ### log-probability
#
# The logarithm of a probability. That of a whole text is the sum over its tokens, where the
# probability itself would be a product too small to store.
#
# ### logits
#
# The scores that a model gives to all tokens before the softmax makes probabilities of them. Only
# their differences count.
#
# ### loss
#
# The number that training makes smaller. For a language model it is the cross-entropy, in nats a
# token.
#
# ### loss mask
#
# Which tokens of a row are learned from. In a conversation these are the assistant's; the user's
# words and a tool's result are read and not graded.
#
# ### memory bandwidth
#
# How many bytes a device can read from its memory in a second. Decoding waits for it, not for
# arithmetic.
#
# ### merge
#
# A rule of byte-pair encoding: these two tokens next to each other become that one. A tokenizer is
# its list of merges, in order.
#
# ### micro-batch
#
# The part of a batch that a device processes at once.
#
# ### midtraining
#
# A stage between pretraining and finetuning, with the same loss: conversations, questions and tool
# use are mixed in, so that the model meets the chat template and new skills.
#
# ### mlp
#
# The part of a block that works on each position alone: a matrix to a wider vector, a
# nonlinearity, a matrix back. Most parameters of a large model are here.
#
# ### momentum
#
# A running average of gradients, used in place of the last one. What gradients agree on adds up,
# and what is noise cancels.
#
# ### muon
#
# An optimizer for matrices: it takes the momentum and makes all its singular values about equal
# before the step, so that rare directions move as far as common ones. Embedding and head are left
# to AdamW.
#
# ### nats
#
# Units of information with the natural logarithm. One nat is 1.44 bits.
#
# ### newton-schulz
#
# An iteration of matrix products that drives all singular values towards 1 and leaves the singular
# vectors as they are. Muon uses it because it needs no decomposition and runs fast on GPUs.
#
# ### on-policy
#
# Learning from answers that the present policy wrote itself. Answers of an older policy have to be
# weighted, or limited by clipping.
#
# ### optimizer
#
# The rule that turns gradients into steps, with whatever it remembers between them.
#
# ### overfitting
#
# Learning the training examples rather than what they have in common: the training loss falls on
# while the loss on held-out data rises.
#
# ### packing
#
# Putting several documents into one row, so that no position is wasted on padding.
#
# ### parameter
#
# A number that training changes. Weights are parameters; settings such as the depth are not.
#
# ### pass at k
#
# The probability that at least one of k sampled answers is right. pass@1 is how often a model is
# right; pass@k for larger k shows what it can do at all.
#
# ### perplexity
#
# The exponential of the loss in nats. A model with perplexity 8 is as unsure as if it chose evenly
# among eight tokens.
#
# ### policy
#
# In reinforcement learning, what chooses the actions. Here it is the language model, and an action
# is a token.
#
# ### pre-norm
#
# Normalising what goes into attention and MLP, and leaving the residual stream itself alone. Deep
# models train more easily than with the norm after each sum.
#
# ### prefill
#
# The phase of generation that reads the prompt: all its tokens in one pass, which fills the cache.
# Arithmetic limits it, unlike decoding.
#
# ### pretraining
#
# The first and longest stage: predicting the next token of much plain text. What a model knows
# comes from here.
#
# ### prompt
#
# The tokens that a model is given before it writes.
#
# ### qk-norm
#
# Normalising queries and keys before they are compared, so that no score can grow without bound.
#
# ### query
#
# The vector with which a position asks: it is compared with the keys of all positions that may be
# seen.
#
# ### rank
#
# One of the processes that train together, and its number: 0 to world size − 1.
#
# ### reference model
#
# A frozen copy of the model before reinforcement learning. The KL divergence from it says how far
# the policy has moved.
#
# ### reinforce
#
# The simplest policy gradient: make each sampled answer more likely in proportion to its
# advantage. GRPO with one update per batch and neither clipping nor KL penalty is this, with the
# group's mean as the baseline.
#
# ### residual stream
#
# The vector at each position that runs through the whole model. Blocks read from it and add to it,
# never replace it, so that gradients have a straight way back.
#
# ### reward
#
# The number that says how good an answer was. Here it is mostly 1 for a right result and 0 for a
# wrong one.
#
# ### reward hacking
#
# Raising the reward without doing what it was meant for, such as writing longer because length is
# paid.
#
# ### rms norm
#
# Dividing a vector by the root of the mean of its squares. Its direction is kept and its length is
# forgotten.
#
# ### rollout
#
# One sampled answer from beginning to end, as used in reinforcement learning.
#
# ### roofline
#
# A plot of the speed that a device can reach against the arithmetic done for each byte read. Left
# of its corner memory bandwidth is the limit, right of it arithmetic is.
#
# ### rope
#
# Rotary position embedding: queries and keys are turned by angles proportional to their position.
# Their dot product then depends on the distance between the two alone.
#
# ### row
#
# One sequence of T tokens in a batch.
#
# ### sampling
#
# Drawing the next token at random with the model's probabilities, often changed by temperature and
# top-k.
#
# ### scaling law
#
# A formula that says how the loss falls with parameters, data or compute, mostly a power law.
# Fitted on small models, it predicts larger ones, within limits.
#
# ### schedule
#
# How the learning rate changes with the step: up during warmup, then constant, then down to zero.
#
# ### sft
#
# Supervised finetuning: training on good conversations, where only the assistant's tokens count.
#
# ### shard
#
# A part of something too large for one file or one device. Token shards are files of token ids;
# sharded optimizer state is spread over the ranks.
#
# ### softcap
#
# Squeezing a score smoothly into a range: c · tanh(x / c) stays between −c and c.
#
# ### softmax
#
# Turning scores into probabilities: the exponential of each, divided by the sum of all.
#
# ### special token
#
# A token that no text can produce, such as `<|assistant_start|>`. It marks structure, and typed by
# a user it stays ordinary text.
#
# ### split pattern
#
# The regular expression that cuts a text into pieces, such as words and numbers, before byte-pair
# encoding. No merge crosses the edge of a piece.
#
# ### step
#
# One update of the parameters, from one batch.
#
# ### surprise
#
# Minus the logarithm of the probability a token had: its own share of the loss. Zero if it was
# certain.
#
# ### temperature
#
# What logits are divided by before sampling. Below 1 the likely becomes likelier, above 1 all
# become more alike.
#
# ### tensor
#
# An array of numbers with any number of axes.
#
# ### token
#
# The unit a model reads and writes: some bytes that stand in its vocabulary, often a word or a
# piece of one.
#
# ### tokenizer
#
# What turns text into token ids and back.
#
# ### tool use
#
# Letting a model call a program and read its result. The program's result is put into the text,
# not chosen by the model.
#
# ### top-k
#
# Sampling among the k most probable tokens only.
#
# ### transformer
#
# The architecture of nearly all language models: an embedding, a stack of blocks with attention
# and MLP, a head.
#
# ### turn
#
# What one side of a conversation says before the other side answers.
#
# ### utf-8
#
# The usual way to write text as bytes. An English letter takes one byte, most other alphabets two,
# Korean or Chinese three, an emoji four.
#
# ### validation set
#
# Data held out from training, to measure on.
#
# ### value
#
# The vector that a position hands over to those that look at it.
#
# ### vocabulary
#
# All tokens that a model knows, numbered from 0 to V − 1.
#
# ### warmup
#
# The first steps of a schedule, in which the learning rate rises from near zero.
#
# ### weight decay
#
# Pulling every weight a little towards zero at each step, in proportion to its size.
#
# ### world size
#
# How many ranks train together.
