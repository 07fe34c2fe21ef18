"""The methods that benchmarks/recovery.py measures, cheapest first."""

CLOSED = (
    "bias",
    "replaceme",
    "linear:rank=16",
    "linear:rank=64",
    "linear",
    "linear:target=dense",
    "span",
    "span:rank=64",
    "refit",
    "linear:rank=64,target=dense,refit",
    "linear:target=dense,refit",
    "mlp",
    "mlp,refit",
)
# Settings for few tokens: a step for every four windows, and larger ones.
FEW = "tokens={tokens},patience=0,accumulate=1,evaluate_every=24"
# New text for what the closed form before it was fitted to, a window a step.
WRITTEN = (
    "tokens={tokens},patience=0,batch=1,accumulate=1,evaluate_every=75,lr=5e-4,beta2=0.99,rank=16,alpha=16,dropout=0,"
    "schedule=cosine,loss=kl,vocabulary=16384,written=1"
)
# {tokens}: those of --trained, which all of them see, in steps of 16 windows; maps, in chains or alone, are fitted on
# them too, so that what comes of training is apart from what comes of more text.
TRAINED = (
    "linear:rank=64",
    "linear",
    "linear:target=dense",
    "refit",
    "span,refit",
    "linear:target=dense,refit",
    "adapter:rank=64,tokens={tokens},patience=0",
    "lora:tokens={tokens},patience=0,accumulate=4",
    "linear:rank=64,lora:tokens={tokens},patience=0,accumulate=4",
    "linear,lora:tokens={tokens},patience=0,accumulate=4",
    f"span,lora:{FEW},lr=1e-3,rank=16,alpha=32,loss=kl",
    f"span,lora:{FEW},lr=1e-3,rank=16,alpha=32,loss=fisher",
    f"span,refit,lora:{FEW},lr=1e-3,rank=16,alpha=32,loss=fisher",
    f"linear:target=dense,refit,lora:{FEW},lr=2e-4,rank=16,alpha=16,dropout=0,schedule=cosine,loss=kl,vocabulary=16384",
    f"linear:target=dense,refit,lora:{WRITTEN}",
    "mlp",
    "mlp,refit",
    f"mlp,refit,lora:{WRITTEN}",
    f"mlp:neurons=2560,refit,lora:{WRITTEN}",
    f"mlp:neurons=3840,refit,lora:{WRITTEN}",
    f"span,distill:{FEW}",
    "streamline:tokens={tokens},patience=0",
    "linear:rank=64,streamline:tokens={tokens},patience=0",
    "linear:rank=64,distill:tokens={tokens},patience=0",
    "continued:tokens={tokens},patience=0",
)
INSIDE = ("", "bias", "linear:rank=64", "linear")  # what is done to the plan of a search with recovery inside
# The dense model on the same tokens, with the settings of a training behind closed forms.
CEILING = f"lora:{FEW},lr=2e-4,rank=16,alpha=16,dropout=0,schedule=cosine"
