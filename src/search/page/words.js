// What the page says, in English and Chinese; the browser's first language that is either decides.

const english = {
  title: "Find pictures by saying what they show",
  documentTitle: "Image search",
  home: "Start page",
  label: "Text to search for",
  placeholder: "Describe a picture",
  placeholderMixed: "Add words to the picture",
  clear: "Clear the text",
  upload: "Search by a picture of yours",
  remove: "Search without the picture",
  go: "Search",
  lead: (count) => `${count} ${count === "1" ? "picture" : "pictures"}, searched by words, by a picture, or by both.`,
  tryThis: "Try",
  yourPicture: "Your picture",
  moreLike: "More like this picture",
  moreLikeThis: "More like this",
  open: "Open the picture in a new tab",
  mixHint: "Type words above to change what is searched for: they are mixed with the picture.",
  picture: "Picture",
  words: "Words",
  weight: "Share of the picture",
  captions: "Captions",
  scores: "Scores",
  score: (score) => `similarity ${score}`,
  found: (count, time) => `${count} ${count === "1" ? "picture" : "pictures"} searched in ${time} ms, closest first`,
  browse: (count) => `${count} ${count === "1" ? "picture" : "pictures"}`,
  searching: "Searching …",
  nothing: "No picture fits these filters.",
  empty: "This collection has no pictures yet.",
  retry: "Try again",
  more: "More pictures",
  api: "JSON API",
  keySearch: "search",
  keyMove: "move",
  keyOpen: "more like this",
  keyBack: "back to the words",
  drop: "Drop a picture to search by it",
  notPicture: "This is not a picture file. Links are not opened: save the picture and drop the file.",
  tooLarge: (most) => `This picture is too large: at most ${most} MB can be searched by.`,
  gone: "The picture that was searched by is no longer here. Please choose it again.",
  offline: "The server does not answer. Is it still running?",
  unreadable: "cannot be shown",
  grid: "Pictures",
  removeFilter: (name) => `Remove the filter ${name}`,
  clearFilters: "Remove all filters",
  model: (name) => `Model ${name}`,
};

const chinese = {
  title: "说出画面，找到图片",
  documentTitle: "图片搜索",
  home: "首页",
  label: "搜索文字",
  placeholder: "描述一张图片",
  placeholderMixed: "为图片添加文字",
  clear: "清除文字",
  upload: "用你的图片搜索",
  remove: "移除图片",
  go: "搜索",
  lead: (count) => `共 ${count} 张图片，可用文字、图片或两者一起搜索。`,
  tryThis: "试试",
  yourPicture: "你的图片",
  moreLike: "与这张图片相似",
  moreLikeThis: "查找相似图片",
  open: "在新标签页中打开图片",
  mixHint: "在上方输入文字，即可与图片混合搜索。",
  picture: "图片",
  words: "文字",
  weight: "图片所占比重",
  captions: "说明",
  scores: "分数",
  score: (score) => `相似度 ${score}`,
  found: (count, time) => `在 ${count} 张图片中搜索，用时 ${time} 毫秒，按相似度排序`,
  browse: (count) => `${count} 张图片`,
  searching: "正在搜索……",
  nothing: "没有符合筛选条件的图片。",
  empty: "这里还没有图片。",
  retry: "重试",
  more: "更多图片",
  api: "JSON 接口",
  keySearch: "搜索",
  keyMove: "移动",
  keyOpen: "查找相似",
  keyBack: "回到文字",
  drop: "松开即可用这张图片搜索",
  notPicture: "这不是图片文件。链接不会被打开：请先保存图片，再拖入文件。",
  tooLarge: (most) => `图片太大：最多 ${most} MB。`,
  gone: "之前用来搜索的图片已不在，请重新选择。",
  offline: "服务器没有响应，它还在运行吗？",
  unreadable: "无法显示",
  grid: "图片",
  removeFilter: (name) => `移除筛选：${name}`,
  clearFilters: "移除全部筛选",
  model: (name) => `模型 ${name}`,
};

export const language =
  (navigator.languages || [navigator.language]).map((tag) => tag.slice(0, 2).toLowerCase()).find((tag) => tag === "zh" || tag === "en") || "en";
export const words = language === "zh" ? chinese : english;

/** Put the words into what is marked with data-word (its text) and data-label (its label). */
export function translate(root) {
  root.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  root.title = words.documentTitle;
  for (const element of root.querySelectorAll("[data-word]")) element.textContent = words[element.dataset.word];
  for (const element of root.querySelectorAll("[data-label]")) {
    element.setAttribute("aria-label", words[element.dataset.label]);
    element.title = words[element.dataset.label];
  }
}
