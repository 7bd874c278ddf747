"""
Decoding with static shapes: each token is sampled by the same operations on the same memory, which
a GPU replays as one CUDA graph and torch.compile compiles once. Without that, a GPU spends most of
the time of a token on the launches of some 200 small kernels.

Not here: the prompt and the loop over the tokens (generation.py), and the model (model.py).
"""
import torch

from components.generation import sample_token

SMALLEST_CACHE = 256  # tokens
WARM_UP_STEPS = 3     # before a capture: the first steps select kernels and allocate workspaces


def make_decoder(model, compile):
    """ A StaticDecoder where it is faster: on a GPU, or compiled. Otherwise None. """
    is_on_cuda = model.transformer.wte.weight.device.type == 'cuda'
    if compile or is_on_cuda:
        return StaticDecoder(model, compile)
    return None


class StaticDecoder:
    """
    Samples the tokens after the first one, for next_tokens(). Use one decoder for all batches: what
    it compiled or captured is used again as long as batch size, cache size, and settings of the
    sampling stay the same.

    All state of step() is in tensors that never move:
        cache: a StaticKVCache for each block
        token: int64 (B,), the last token; -1 if its logits were not finite
        position: int64 (1,), its place in the cache
        random_numbers: (B,) in [0, 1), which decide the next token

    Args:
        model: a GPT
        compile: whether to compile the step
    """

    def __init__(self, model, compile=False):
        self.model = model
        self.use_cuda_graph = model.transformer.wte.weight.device.type == 'cuda'
        self.run_step = self.step
        if compile:
            self.run_step = torch.compile(self.step, fullgraph=True)
        self.graph = None     # a CUDA graph of a step
        self.cache = None
        self.made_for = None  # the shapes and settings that this state and the graph are for

    def cache_size(self, n):
        """ The size of a cache for `n` tokens: a few sizes for all prompts. """
        size = SMALLEST_CACHE
        while size < n:
            size *= 2
        return min(size, self.model.config.block_size)

    @torch.inference_mode()
    def start(self, token, cache, settings):
        """
        Copies the state of a batch whose prompts the model has read.

        Args:
            token: int64 (B,), the first sampled token, which is not in the cache
            cache: a KVCache for each block, as large as it has to be for the last token
            settings: dict of arguments for sample_token()
        """
        B = len(token)
        size = self.cache_size(cache[0].size)
        if self.made_for != (B, size, settings):
            self.allocate(B, size, cache)
            self.settings = settings
            if self.use_cuda_graph:
                self.capture()
            self.made_for = (B, size, settings)

        for static_cache, layer_cache in zip(self.cache, cache):
            static_cache.load(layer_cache)
        self.token.copy_(token)
        self.position.fill_(cache[0].length)

    @torch.inference_mode()
    def next_token(self, random_numbers):
        """
        Samples the next token by random_numbers (B,) in [0, 1) -> int64 (B,), which the next call
        overwrites. Nothing waits for the GPU.
        """
        self.random_numbers.copy_(random_numbers)
        if self.graph is not None:
            self.graph.replay()
        else:
            self.run_step()
        return self.token

    def step(self):
        """ Reads the last token and samples the next one, without a synchronization. """
        last_token = self.token.clamp(min=0)[:, None]                       # (B, 1)
        x = self.model.hidden_states(last_token, self.position, self.cache)  # (B, 1, C)
        logits = self.model.logits(x)[:, -1].float()                        # (B, vocab_size)
        self.token.copy_(sample_token(logits, self.random_numbers, **self.settings))
        self.position.add_(1)

    def allocate(self, B, size, cache):
        """ Makes the state, with a cache of the shapes and dtypes of `cache`. """
        self.made_for = None
        self.graph = None  # first, which frees the memory of the previous state
        self.cache = None
        device = cache[0].k.device
        self.token = torch.zeros(B, dtype=torch.long, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.random_numbers = torch.zeros(B, device=device)
        self.cache = [StaticKVCache(layer_cache, size, self.position) for layer_cache in cache]

    def capture(self):
        """
        Captures a step in a CUDA graph, before the state has a prompt that this would change. See
        "CUDA Graphs" in PyTorch's notes on CUDA semantics.

        torch.compile(mode='reduce-overhead') requires Triton and a C compiler, and skips functions
        that change their inputs, as step() changes the cache.
        """
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_STEPS):
                self.run_step()
                self.position.zero_()  # block_size may be smaller than the number of these steps
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: what other threads call at the same time does not end the capture
        with torch.cuda.graph(graph, capture_error_mode='thread_local'):
            self.run_step()
        self.graph = graph


class StaticKVCache:
    """
    The keys and values that one attention layer has seen, in tensors (B, nh, size, hs) with zeros
    for later tokens. The new token is at `position`, int64 (1,).
    """

    is_static = True

    def __init__(self, cache, size, position):
        B, nh, _, hs = cache.k.shape
        self.k = cache.k.new_zeros(B, nh, size, hs)
        self.v = cache.v.new_zeros(B, nh, size, hs)
        self.position = position

    def num_keys(self, T):
        """ The number of keys after T more tokens, those of later tokens included. """
        return self.k.shape[2]

    def float_mask(self, mask):
        """ The numbers that a bool mask adds to scores. Otherwise each layer converts it again. """
        if mask.dtype != torch.bool:
            return mask
        return torch.where(mask, 0.0, -torch.inf).to(self.k.dtype)

    def load(self, cache):
        """ Copies a KVCache. """
        n = cache.length
        self.k[:, :, :n] = cache.k[:, :, :n]
        self.v[:, :, :n] = cache.v[:, :, :n]
        # a NaN of an earlier text would pass a mask, as 0 times NaN is NaN
        self.k[:, :, n:] = 0
        self.v[:, :, n:] = 0

    def extend(self, k, v):
        """ Writes k and v (B, nh, 1, hs) -> those of all places, (B, nh, size, hs). """
        self.k.index_copy_(2, self.position, k)
        self.v.index_copy_(2, self.position, v)
        return self.k, self.v
