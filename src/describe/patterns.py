"""What noise in web text looks like. Every repetition is bounded, so that a search takes linear time on any text."""

from __future__ import annotations

import re

_I = re.IGNORECASE


def _any(*patterns: str) -> str:
    """A pattern for one of these."""
    return f"(?:{'|'.join(patterns)})"


# ---- markup and tokens -----------------------------------------------------------------------------------------------

ENTITY = re.compile(r"&(?:#\d{1,7}|#x[0-9a-f]{1,6}|[a-z][a-z0-9]{1,30});", _I)
PERCENT = re.compile(r"%(?:[2-7][0-9A-Fa-f]|[C-Fc-f][0-9A-Fa-f]%[89ABab])")
TERMINAL = re.compile(r"\x1b(?:\[[0-9;?]{0,20}[A-Za-z]|\][^\x07\x1b]{0,100}\x07)?")
TAG = re.compile(
    _any(
        r"<(script|style)\b[^<>]{0,200}>[^<>]{0,2000}</\1 ?>",
        r"<!--[^<>]{0,2000}-->",
        r"</?[a-z][^<>]{0,500}>",
        r"<[!?][^<>]{0,200}>",
        r"\[/?(?:img|url|b|i|u|quote|caption|gallery)(?:[ =][^\[\]]{0,300})?\]",
    ),
    _I,
)
# Special tokens of chat templates: ChatML, Llama 2 and 3, Mistral, Gemma, DeepSeek, T5, BERT, and the tags of thoughts
# and tools; and any half of one.
_TOKEN_NAMES = _any(
    *("s", "sys", "unk", "pad", "bos", "eos", "cls", "sep", "mask", "image", "video", "audio", "think", "thinking"),
    *(r"tool_\w{1,20}", r"(?:start|end)_of_\w{1,20}", r"extra_id_\d{1,3}", r"unused\d{1,3}"),
)
_BRACKET_NAMES = _any(
    *("inst", "sys", "system_prompt", "tool_calls", "tool_results", "available_tools", "img", "img_end", "img_break"),
    *("cls", "sep", "mask", "pad", "unk"),
)
SPECIAL_TOKEN = re.compile(
    _any(
        r"<[|｜][^<>]{0,400}?[|｜]>",
        rf"<{{1,2}}/?{_TOKEN_NAMES}>{{1,2}}",
        rf"\[/?{_BRACKET_NAMES}\]",
        r"<[|｜]",
        r"[|｜]>",
    ),
    _I,
)
FENCE = re.compile(r"`{3,}|~{3,}|\"{3,}|'{3,}")

# ---- single words ----------------------------------------------------------------------------------------------------

_DOMAINS = _any(
    *(
        "com",
        "org",
        "net",
        "edu",
        "gov",
        "info",
        "biz",
        "io",
        "tv",
        "ly",
        "de",
        "fr",
        "jp",
        "ru",
        "cn",
        "ca",
        "au",
        "nl",
    ),
    *("eu", r"co\.\w\w", r"com\.\w\w", r"ac\.uk", r"org\.uk"),
)
URL = re.compile(
    rf"(?:https?|ftp|file)://|\bwww\.\w|(?<![\w.@-])(?:[\w-]{{1,63}}\.){{1,5}}{_DOMAINS}(?![\w-])",
    _I,
)
EMAIL = re.compile(r"[\w.+-]{1,64}@[\w-]{1,63}\.[\w.-]{2,}")
HASHTAG = re.compile(r"[(\[\"']?#((?=[\w#]*[^\W\d_])[^\W_][\w#]*)[)\]\"'.,;:!?]*")
EMOTICONS = {
    *(":)", ":-)", ":(", ":-(", ";)", ";-)", ":D", ":-D", ":P", ":-P", ":p", ":-p", ":/", ":-/", ":o", ":-o", ":'("),
    *("<3", "</3", "xD", "XD", "^^", "^_^", "-_-", "o_O", "=)", "=D", "(:", ":))", ":)))", ":-))", ":*", ":-*", "8-)"),
}

# ---- several words ---------------------------------------------------------------------------------------------------

_WORD = r"[A-Z](?:\.(?:[A-Z]\.)?|[\w'’-]{0,30})"
_NAME = rf"(?:@\w{{1,40}}|(?:dpa|afp|epa)\b|{_WORD}(?: (?:(?:van|von|de|da|del|der|di|la|le) )?{_WORD}){{0,3}})"
_NAMES = rf"{_NAME}(?:(?:,| ?/| ?\|) ?{_NAME}){{0,2}}"
_SITES = _any(
    *("flickr", "instagram", "twitter", "pinterest", "facebook", "youtube", "tumblr", "reddit", "imgur", "500px"),
    *("unsplash", "pexels", "pixabay", "wikimedia"),
)
_AGENCIES = _any(
    *("getty ?images", "shutterstock", "alamy", "i ?stock(?: ?photo)?", "adobe ?stock", "dreamstime", "depositphotos"),
    *("123rf", "fotolia", "bigstock(?:photo)?", "corbis", "rex features", "associated press", "zuma press"),
    *("canstock(?:photo)?",),
)
_PICTURE = _any(
    *("photo(?:graph)?s?", "photography", "pictures?", "pics?", "images?", "illustrations?", "vectors?", "clip ?arts?"),
    *("footage", "videos?", "art"),
)
_RIGHTS = r"(?: ?(?:by|©|\(c\)|(?:19|20)\d\d(?: ?- ?(?:19|20)?\d\d)?,?)){0,3}"
_BY = _any(
    r"\b(?:(?:photo|foto|image|picture|pic|photograph)s?|photography|photographed|shot|uploaded|posted|pinned)"
    r"(?: (?:credits?|taken|courtesy))?(?: by|:| ?©|/)",
    *(r"\b(?:photo )?credits?:", r"\bcredits? to", r"\b(?:photo |image )?courtesy of", r"©", r"\(c\)", r"\bcopyright"),
)
CREDIT = re.compile(
    _any(
        rf"[(\[]?(?i:{_BY}){_RIGHTS} ?{_NAMES}(?: for {_NAME})?(?:,? ?(?:19|20)\d\d)?(?: ?/)?(?: ?[)\]])?",
        r"(?i:[-,]? ?\bcc[- ]by(?:-(?:sa|nc|nd)){0,2}(?:[/ ]\d\.\d)?\b)",
        rf"(?i:[(\[|-]? ?\b(?:via|from|on) {_SITES}\b[)\]]?)",
        rf"(?:[(\[|]|(?<= )[-–—]) ?[Vv]ia {_NAME}[)\]]?",
        r"(?i:\ball rights reserved\.?|\bno copyright infringement intended\.?)",
        r"©",
    )
)
STOCK = re.compile(
    _any(
        rf"[-–—|.]? ?\b(?:buy|download) this (?:stock |royalty[ -]free )?{_PICTURE}(?: (?:on|from|at) \w{{1,30}})?"
        r"(?: (?:&|and) find (?:other|more|similar) (?:images|photos|pictures))?",
        rf"(?:[|/,–—-] ?)?(?:\b(?:(?:royalty|rights)[ -](?:free|managed)|editorial|premium|free) )?\bstock {_PICTURE}\b"
        rf"(?: (?:by|from|of|(?:and|&) royalty[ -]free {_PICTURE}))?",
        rf"\broyalty[ -]free(?: {_PICTURE})?\b(?: (?:and|&) {_PICTURE}\b)?",
        rf"(?:[|/,@–—-] ?|\b(?:by|via|from) )?\b{_AGENCIES}\b(?: {_PICTURE})?",
        r"\bclick (?:on )?(?:the |this )?(?:image |photo |picture )?(?:to|for) (?:enlarge|zoom|view|see|larger?|full)"
        r"(?: (?:the |a )?(?:image|photo|picture|version|view|size|larger|full))*",
        r"\bimage may contain:?|(?:[|–—-] ?)?\bwikimedia commons\b|^file:",
        r"\b(?:image|photo|picture|stock) (?:id|no\.?)[:#]? ?#?\d{3,12}\b",
    ),
    _I,
)
_SCREENSHOT = re.compile(
    r"\bscreen ?shots?[ _-](?:from )?\d{4}[-_.:]?\d\d[-_.:]?\d\d(?: at)?"
    r"(?:[ _-]\d{1,2}[.:_-]?\d\d(?:[.:_-]?\d\d)?)?(?: [ap]m)?\b(?:\.\w{3,4})?",
    _I,
)
DATE = re.compile(
    r"(?:\b(?:on|at|from) )?(?<![\w.,/:$€£-])"
    r"(?:(?:19|20)\d\d([-:/.])[01]?\d\1[0-3]?\d|[0-3]?\d([-/.])[0-3]?\d\2(?:19|20)?\d\d)"
    r"(?:[T ,]{1,2}[0-2]?\d[:.][0-5]\d(?:[:.][0-5]\d)?(?: ?[ap]m)?)?(?![\w/-]|[.,]\d)|\b[0-2]\d:[0-5]\d:[0-5]\d\b",
    _I,
)
EXIF = re.compile(
    r"(?<![\w/])"
    + _any(
        *(r"[fƒ](?: ?/ ?)?\d{1,2}(?:\.\d)?", r"iso[ :-]?\d{2,6}", r"1/\d{1,5} ?s(?:ec(?:onds?|s)?)?", r"1/\d{2,5}"),
        *(r"\d{1,4}(?:\.\d)? ?mm", r"exposure:? ?[\d/.]{1,8}", r"[-+]?\d\.\d ?ev"),
    )
    + r"(?![\w/])[,;|]?",
    _I,
)
PHONE = re.compile(
    r"(?<![\w.,+-])"
    + _any(
        r"\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?(?:\d{2,4}[ .-]?){2,4}\d{2,4}",
        *(r"\(\d{3}\) ?\d{3}[ .-]\d{4}", r"\d{3}[ .-]\d{3}[ .-]\d{4}", r"0\d{2,4}[ /-]\d{3,4}[ -]?\d{3,4}"),
    )
    + r"(?![\w-]|[.,]\d)"
)
# (flag, what tells cheaply, in lower case, that it may be there, what goes)
PHRASES = (
    ("file_name", re.compile("screen ?shot"), _SCREENSHOT),
    (
        "stock",
        re.compile(
            r"stock|click|may con|wikim|^file:|buy th|download|royalty|getty|alamy|dreamst|depositp|123rf|fotolia|"
            r"corbis|rex f|press|(?:image|photo) [in]"
        ),
        STOCK,
    ),
    (
        "credit",
        re.compile(
            r"\bby |photo|image|pic|shot|post|credit|court|foto|cc[- ]by|©|\(c\)|copyr|via |(?:from|on) [fitpyr5uw]|"
            r"reserved"
        ),
        CREDIT,
    ),
    ("date", re.compile(r"\d[-/:.]\d"), DATE),
)
LEAVES_ENDS = {"url", "pii_email", "mention", "credit", "stock", "file_name", "date", "exif"}
OPEN_ENDS = {  # what is no end of a text, when what followed has gone
    *("via", "by", "from", "at", "with", "on", "in", "of", "and", "or", "the", "a", "an", "see", "visit", "to", "for"),
    *("http", "more", "@", "&", "rt"),
}
OPEN_STARTS = {"and", "or", "by", "via", "with", "&", "rt", "from"}

# ---- the whole -------------------------------------------------------------------------------------------------------

NO_SPACES = re.compile(r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]{6}")  # Thai, kana, ideographs
CAPITAL = re.compile(r"[A-Z]")
DIGIT = re.compile(r"\d")
# Nothing of a text without these needs to be settled.
UNSETTLED = re.compile(
    r"[^\w\s.,'’\-()!?&$%]|[.,!?()'-]{2}|[(\s][.,!?)]|(?<!\S)[-&](?!\S)|__|[a-z][,;.!?][A-Za-z]|^\W|[^\w.!?)]$|\( "
)
PUNCTUATION = (
    (re.compile(r" ?(?:[|•¦·]|::|(?<=\s)//(?=\s))(?: ?[|•¦·])* ?"), ", "),
    (re.compile(r"[*=~^_<>\\]{2,}|(?<!\S)[*=~^_<>\\+#/](?!\S)|(?<!\S)[-–—]{2,}(?!\S)|-{3,}|#{2,}"), " "),
    (re.compile(r"\( ?[,;:-]* ?\)|\[ ?[,;:-]* ?\]|\{ ?[,;:-]* ?\}|\"\s*\""), " "),
    (re.compile(r"([!?,;:])\1+"), r"\1"),
    (re.compile(r"(?:!\?|\?!){2,}[!?]?"), "?!"),
    (re.compile(r"\.{4,}|(?<!\.)\.\.(?!\.)"), "..."),
    (re.compile(r"(?<=[^\W\d_]{2})([,;](?=[^\W\d_]{2})|[.!?](?=[A-Z][a-z]))"), r"\1 "),
    (re.compile(r" {2,}"), " "),
    (re.compile(r" (?=[,;:!?](?:\s|$)|\.(?:\s|$))"), ""),
    (re.compile(r"[,;:]+(?=[,;.!?](?:\s|$))"), ""),
)
EDGES = " \t,;:|-–—/\\&*=~_<>^`@"
LEFT_EDGES = " .!?)]}"
ACRONYMS = {
    *("NASA", "USA", "UK", "EU", "NATO", "BMW", "NYC", "TV", "USS", "HMS", "RAF", "USAF", "FBI", "LED", "DVD", "CD"),
    *("VW", "UFO", "NBA", "NFL", "NHL", "MLB", "FIFA", "UEFA", "MTV", "BBC", "CNN", "LA", "NY", "D.C.", "DC", "U.S."),
    *("I", "II", "III", "IV", "VI", "VII", "VIII", "IX", "XI", "XII", "XIV", "GMC", "KFC", "IBM", "SUV", "ATV", "RV"),
    *("DJ", "PC"),
}
CONNECTORS = {"of", "the", "and", "de", "la", "le", "du", "von", "van", "der", "di", "da", "in", "at", "on", "&", "y"}
FINITE = {  # verbs, and subjects that come with one
    *("is", "are", "was", "were", "am", "has", "have", "had", "does", "did", "do", "can", "could", "will", "would"),
    *("may", "must", "should", "it's", "i'm", "he's", "she's", "they're", "we're", "isn't", "wasn't", "don't"),
    *("didn't", "i've", "we", "i", "they", "he", "she", "went", "took", "got", "made", "saw", "shows", "sits"),
    *("stands", "looks", "plays", "runs", "walks", "rides", "holds", "eats", "wears", "jumps", "poses", "lies"),
    *("waits", "sleeps", "watches", "flies"),
}
