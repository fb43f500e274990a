"""What noise in web text looks like. Every pattern is bounded, so that no text takes more than linear time."""

from __future__ import annotations

import re

_I = re.IGNORECASE

# ---- markup and tokens -----------------------------------------------------------------------------------------------

ENTITY = re.compile(r"&(?:#\d{1,7}|#x[0-9a-f]{1,6}|[a-z][a-z0-9]{1,30});", _I)
PERCENT = re.compile(r"%(?:[2-7][0-9A-Fa-f]|[C-Fc-f][0-9A-Fa-f]%[89ABab])")
TERMINAL = re.compile(r"\x1b(?:\[[0-9;?]{0,20}[A-Za-z]|\][^\x07\x1b]{0,100}\x07)?")
TAG = re.compile(
    r"<(script|style)\b[^<>]{0,200}>[^<>]{0,2000}</\1 ?>|<!--[^<>]{0,2000}-->|</?[a-z][^<>]{0,500}>|<[!?][^<>]{0,200}>"
    r"|\[/?(?:img|url|b|i|u|quote|caption|gallery)(?:[ =][^\[\]]{0,300})?\]",
    _I,
)
# Special tokens of chat templates: ChatML, Llama 2 and 3, Mistral, Gemma, DeepSeek, T5, BERT, and the tags of thoughts
# and tools.
SPECIAL_TOKEN = re.compile(
    r"<[|｜][^<>]{0,400}?[|｜]>|<{1,2}/?(?:s|sys|unk|pad|bos|eos|cls|sep|mask|image|video|audio|think|thinking|tool_\w{1,20}|"
    r"(?:start|end)_of_\w{1,20}|extra_id_\d{1,3}|unused\d{1,3})>{1,2}|"
    r"\[/?(?:inst|sys|system_prompt|tool_calls|tool_results|available_tools|img|img_end|img_break|cls|sep|mask|pad|unk)\]|"
    r"<[|｜]|[|｜]>",
    _I,
)
FENCE = re.compile(r"`{3,}|~{3,}|\"{3,}|'{3,}")

# ---- single words ----------------------------------------------------------------------------------------------------

_DOMAINS = r"(?:com|org|net|edu|gov|info|biz|io|tv|ly|de|fr|jp|ru|cn|ca|au|nl|eu|co\.\w\w|com\.\w\w|ac\.uk|org\.uk)"
URL = re.compile(rf"(?:https?|ftp|file)://|\bwww\.\w|(?<![\w.@-])(?:[\w-]{{1,63}}\.){{1,5}}{_DOMAINS}(?![\w-])", _I)
EMAIL = re.compile(r"[\w.+-]{1,64}@[\w-]{1,63}\.[\w.-]{2,}")
HASHTAG = re.compile(r"[(\[\"']?#((?=[\w#]*[^\W\d_])[^\W_][\w#]*)[)\]\"'.,;:!?]*")
EMOTICONS = {
    *(":)", ":-)", ":(", ":-(", ";)", ";-)", ":D", ":-D", ":P", ":-P", ":p", ":-p", ":/", ":-/", ":o", ":-o", ":'("),
    *("<3", "</3", "xD", "XD", "^^", "^_^", "-_-", "o_O", "=)", "=D", "(:", ":))", ":)))", ":-))", ":*", ":-*", "8-)"),
}

# ---- several words ---------------------------------------------------------------------------------------------------

_NAME = r"(?:@\w{1,40}|(?:[A-Z][\w'’.-]{0,30}|[A-Z]\.)(?: (?:(?:van|von|de|da|del|der|di|la|le) )?(?:[A-Z][\w'’-]{0,30}|[A-Z]\.)){0,3})"
_SITES = r"(?:flickr|instagram|twitter|pinterest|facebook|youtube|tumblr|reddit|imgur|500px|unsplash|pexels|pixabay|wikimedia)"
_AGENCIES = (
    r"(?:getty ?images|gettyimages|shutterstock|alamy|i ?stock(?: ?photo)?|adobe ?stock|dreamstime|depositphotos|123rf|fotolia|"
    r"bigstock(?:photo)?|corbis|rex features|associated press|zuma press|canstock(?:photo)?)"
)
_PICTURE = (
    r"(?:photo(?:graph)?s?|photography|pictures?|pics?|images?|illustrations?|vectors?|clip ?arts?|footage|videos?|art)"
)

CREDIT = re.compile(
    rf"[(\[]?\b(?i:(?:(?:photo|image|picture|pic|photograph)s?|photography|shot|uploaded|posted|pinned)"
    rf"(?: (?:credits?|taken|courtesy))?(?: by| of|:| ?©|/)|(?:photo )?credits?:|credits? to|(?:photo |image )?courtesy of|"
    rf"©|\(c\)|copyright)(?: ?(?:by|©|\(c\)|(?:19|20)\d\d(?: ?- ?(?:19|20)?\d\d)?,?)){{0,3}} ?{_NAME}"
    rf"(?:(?:,| ?/| ?\|) ?{_NAME}){{0,2}}[)\]]?"
    rf"|(?i:[(\[|-]? ?\b(?:via|from|on) {_SITES}\b[)\]]?)|(?:[(\[|]|(?<= )[-–—]) ?[Vv]ia {_NAME}[)\]]?"
    r"|(?i:all rights reserved\.?|no copyright infringement intended\.?)|[©]"
)
STOCK = re.compile(
    rf"(?:[|/,–—-] ?)?(?:\b(?:(?:royalty|rights)[ -](?:free|managed)|editorial|premium|free) )?\bstock {_PICTURE}\b"
    rf"(?: (?:by|from|of|and royalty[ -]free {_PICTURE}))?|\broyalty[ -]free(?: {_PICTURE})?\b(?: (?:and|&) {_PICTURE}\b)?"
    rf"|(?:[|/,@–—-] ?|\b(?:by|via|from) )?\b{_AGENCIES}\b(?: {_PICTURE})?|\b(?:image|photo|picture|stock) (?:id|no\.?)[:#]? ?#?\d{{3,12}}\b",
    _I,
)
_SHOT = re.compile(
    r"\bscreen ?shots?[ _-](?:from )?\d{4}[-_.:]?\d\d[-_.:]?\d\d(?: at)?(?:[ _-]\d{1,2}[.:_-]?\d\d(?:[.:_-]?\d\d)?)?(?: [ap]m)?\b(?:\.\w{3,4})?",
    _I,
)
DATE = re.compile(
    r"(?<![\w.,/:$€£-])(?:(?:19|20)\d\d([-:/.])[01]?\d\1[0-3]?\d|[0-3]?\d([-/.])[0-3]?\d\2(?:19|20)?\d\d)"
    r"(?:[T ,]{1,2}[0-2]?\d[:.][0-5]\d(?:[:.][0-5]\d)?(?: ?[ap]m)?)?(?![\w/-]|[.,]\d)|\b[0-2]\d:[0-5]\d:[0-5]\d\b",
    _I,
)
EXIF = re.compile(
    r"(?<![\w/])(?:f ?/ ?\d{1,2}(?:\.\d)?|ƒ ?/ ?\d{1,2}(?:\.\d)?|iso[ :-]?\d{2,6}|1/\d{1,5} ?s(?:ec(?:onds?|s)?)?|1/\d{2,5}|"
    r"\d{1,4}(?:\.\d)? ?mm|exposure:? ?[\d/.]{1,8}|[-+]?\d\.\d ?ev)(?![\w/])[,;|]?",
    _I,
)
PHONE = re.compile(
    r"(?<![\w.,+-])(?:\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?(?:\d{2,4}[ .-]?){2,4}\d{2,4}|\(\d{3}\) ?\d{3}[ .-]\d{4}|"
    r"\d{3}[ .-]\d{3}[ .-]\d{4}|0\d{2,4}[ /-]\d{3,4}[ -]?\d{3,4})(?![\w-]|[.,]\d)"
)
# (flag, lower-case hints of which one must be there, what goes)
PHRASES: tuple[tuple[str, tuple[str, ...] | None, re.Pattern[str]], ...] = (
    ("file_name", ("screenshot", "screen shot"), _SHOT),
    ("stock", ("stock", "royalty", "getty", "alamy", "dreamstime", "depositphotos", "123rf", "fotolia", "corbis")
     + ("rex features", "associated press", "zuma press", "rights managed", " id", " no"), STOCK),
    ("credit", (" by ", "photo", "image", "picture", "pic", "credit", "courtesy", "©", "(c)", "copyright", "via ")
     + ("flickr", "instagram", "twitter", "rights reserved", "facebook", "tumblr", "pinterest"), CREDIT),
    ("date", ("-", "/", ":", "."), DATE),
)  # fmt: skip
LEAVES_ENDS = {"url", "pii_email", "mention", "credit", "stock", "file_name", "date", "exif"}
OPEN_ENDS = {
    *("via", "by", "from", "at", "with", "on", "in", "of", "and", "or", "the", "a", "an", "see", "visit", "to", "for"),
    *("http", "more", "@", "&", "rt"),
}

# ---- the whole -------------------------------------------------------------------------------------------------------

PUNCTUATION = (
    (re.compile(r" ?(?:[|•¦·]|::|(?<=\s)//(?=\s))(?: ?[|•¦·])* ?"), ", "),
    (re.compile(r"[*=~^_<>\\]{2,}|(?<!\S)[*=~^_<>\\+#/](?!\S)|(?<!\S)[-–—]{2,}(?!\S)|-{3,}|#{2,}"), " "),
    (re.compile(r"\( ?[,;:-]* ?\)|\[ ?[,;:-]* ?\]|\{ ?[,;:-]* ?\}|\"\s*\""), " "),
    (re.compile(r"([!?,;:])\1+"), r"\1"),
    (re.compile(r"(?:!\?|\?!){2,}[!?]?"), "?!"),
    (re.compile(r"\.{4,}|(?<!\.)\.\.(?!\.)"), "..."),
    (re.compile(r" {2,}"), " "),
    (re.compile(r" (?=[,;:!?](?:\s|$)|\.(?:\s|$))"), ""),
    (re.compile(r"[,;:]+(?=[,;.!?](?:\s|$))"), ""),
)
EDGES = " \t,;:|-–—/\\&+*=~_<>^`@"
LEFT_EDGES = " .!?)]}'\"" if False else " .!?)]}"
ACRONYMS = {
    *(
        "NASA",
        "USA",
        "UK",
        "EU",
        "NATO",
        "BMW",
        "NYC",
        "TV",
        "USS",
        "HMS",
        "RAF",
        "USAF",
        "FBI",
        "LED",
        "DVD",
        "CD",
        "DJ",
    ),
    *("VW", "UFO", "NBA", "NFL", "NHL", "MLB", "FIFA", "UEFA", "MTV", "BBC", "CNN", "LA", "NY", "D.C.", "DC", "U.S."),
    *(
        "I",
        "II",
        "III",
        "IV",
        "VI",
        "VII",
        "VIII",
        "IX",
        "XI",
        "XII",
        "XIV",
        "GMC",
        "KFC",
        "IBM",
        "SUV",
        "ATV",
        "RV",
        "PC",
    ),
}
CONNECTORS = {
    "of",
    "the",
    "and",
    "de",
    "la",
    "le",
    "du",
    "von",
    "van",
    "der",
    "di",
    "da",
    "in",
    "at",
    "on",
    "&",
    "y",
    "e",
}
FINITE = {  # verbs and their subjects that make a sentence
    *(
        "is",
        "are",
        "was",
        "were",
        "am",
        "has",
        "have",
        "had",
        "does",
        "did",
        "do",
        "can",
        "could",
        "will",
        "would",
        "may",
    ),
    *(
        "must",
        "should",
        "it's",
        "i'm",
        "he's",
        "she's",
        "they're",
        "we're",
        "isn't",
        "wasn't",
        "don't",
        "didn't",
        "i've",
    ),
    *(
        "we",
        "i",
        "they",
        "he",
        "she",
        "went",
        "took",
        "got",
        "made",
        "saw",
        "shows",
        "sits",
        "stands",
        "looks",
        "plays",
    ),
    *(
        "runs",
        "walks",
        "rides",
        "holds",
        "eats",
        "wears",
        "jumps",
        "poses",
        "lies",
        "waits",
        "sleeps",
        "watches",
        "flies",
    ),
}
