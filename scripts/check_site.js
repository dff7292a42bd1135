// What check_site.py asks of a page, run inside it. Each function returns sentences about faults.
window.look = (() => {
  const LEAST = 4.5, LEAST_LARGE = 3, SHOWN = 5;
  const pixel = Object.assign(document.createElement("canvas"), {width: 1, height: 1}).getContext("2d", {willReadFrequently: true});
  const colours = new Map();

  // [r, g, b, alpha] of any CSS colour, by drawing it
  function rgba(text) {
    if (!colours.has(text)) {
      pixel.clearRect(0, 0, 1, 1);
      pixel.fillStyle = text;
      pixel.fillRect(0, 0, 1, 1);
      const [r, g, b, a] = pixel.getImageData(0, 0, 1, 1).data;
      colours.set(text, [r, g, b, a / 255]);
    }
    return colours.get(text);
  }

  const over = (top, below) => [0, 1, 2].map((i) => top[3] * top[i] + (1 - top[3]) * below[i]);

  const light = Array.from({length: 256}, (_, x) => (x /= 255) <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  const luminance = (r, g, b) => 0.2126 * light[Math.round(r)] + 0.7152 * light[Math.round(g)] + 0.0722 * light[Math.round(b)];
  const contrast = (x, y) => (Math.max(x, y) + 0.05) / (Math.min(x, y) + 0.05);  // of luminances
  const ratio = (a, b) => contrast(luminance(...a.slice(0, 3)), luminance(...b.slice(0, 3)));

  // what is behind an element, ancestors' backgrounds laid over each other
  function behind(element, known) {
    if (!element) return [255, 255, 255];
    if (!known.has(element)) {
      const own = rgba(getComputedStyle(element).backgroundColor);
      known.set(element, own[3] === 1 ? own.slice(0, 3) : over(own, behind(element.parentElement, known)));
    }
    return known.get(element);
  }

  // the same number for elements that look alike: their tags, classes, styles and rows' parities, and their ancestors'
  const paths = new Map(), numbers = new WeakMap();
  function path(element) {
    if (!element) return 0;
    if (!numbers.has(element)) {
      const own = `${path(element.parentElement)} ${element.tagName} ${element.getAttribute("class")} ` +
        `${element.getAttribute("style")} ${element.tagName === "TR" ? element.rowIndex % 2 : ""}`;
      if (!paths.has(own)) paths.set(own, paths.size + 1);
      numbers.set(element, paths.get(own));
    }
    return numbers.get(element);
  }

  const seen = (element) => element.checkVisibility({opacityProperty: true, visibilityProperty: true}) &&
    element.getClientRects().length > 0 && element.getBoundingClientRect().width > 1;

  // one of each kind of text and formula that can be seen; what has text is the same by day and by night
  let kinds = null;
  function written() {
    if (kinds) return kinds;
    const found = new Map();
    const add = (element) => {
      const kind = path(element);
      if (!found.has(kind) && seen(element)) found.set(kind, element);
    };
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
      const parent = walker.currentNode.parentElement;
      const set = () => !parent.closest("script, style, noscript, title, mjx-assistive-mml");
      if (walker.currentNode.data.trim() && set()) add(parent);
    }
    document.querySelectorAll("mjx-container, math").forEach(add);
    return (kinds = [...found.values()]);
  }

  const name = (element) => {
    const text = (element.textContent || element.alt || "").trim().replace(/\s+/g, " ").slice(0, 40);
    return `<${element.tagName.toLowerCase()} class="${element.getAttribute("class") || ""}"> "${text}"`;
  };

  return {
    async ready() {
      if (window.MathJax?.startup?.promise) await window.MathJax.startup.promise;
      await document.fonts.ready;
      for (const image of document.images) image.loading = "eager";
      await Promise.all([...document.images].map((image) => image.decode().catch(() => {})));
    },

    formulas() {
      const faults = [];
      for (const formula of document.querySelectorAll("div.math, span.math")) {
        const error = formula.querySelector("[data-mjx-error]");
        if (error) faults.push(`a formula is wrong: ${error.getAttribute("data-mjx-error")}`);
        else if (!formula.querySelector("mjx-container, math")) faults.push(`a formula is not set: ${name(formula)}`);
      }
      for (const image of document.images) if (!image.naturalWidth) faults.push(`a picture is missing: ${image.src}`);
      return faults.slice(0, SHOWN);
    },

    // the page may not scroll sideways; boxes inside it may
    overflow() {
      const wide = document.documentElement.clientWidth;
      if (document.documentElement.scrollWidth <= wide) return [];
      const sticking = [...document.body.querySelectorAll("*")].filter((element) => {
        if (element.getBoundingClientRect().right <= wide + 1 || !seen(element)) return false;
        for (let up = element.parentElement; up; up = up.parentElement) {
          if (getComputedStyle(up).overflowX !== "visible" && up !== document.body) return false;
        }
        return true;
      });
      const worst = sticking.filter((element) => ![...element.children].some((child) => sticking.includes(child)));
      const size = document.documentElement.scrollWidth;
      return (worst.length ? worst.slice(0, 3).map(name) : ["?"]).map((x) => `the page is ${size} px wide, by ${x}`);
    },

    contrast(mode) {
      document.documentElement.dataset.theme = document.documentElement.dataset.mode = mode;
      const still = document.head.appendChild(document.createElement("style"));
      still.textContent = "*, ::before, ::after { transition: none !important; animation: none !important; }";
      const known = new Map(), faults = new Map();
      for (const element of written()) {
        const style = getComputedStyle(element);
        const size = parseFloat(style.fontSize), heavy = parseInt(style.fontWeight) >= 700;
        const back = behind(element, known), ink = over(rgba(style.color), back);
        const found = ratio(ink, back), least = size >= 24 || (heavy && size >= 18.66) ? LEAST_LARGE : LEAST;
        const key = `${ink}|${back}`;
        if (!(found >= least) && !faults.has(key)) {
          faults.set(key, `contrast ${found.toFixed(1)}, less than ${least}: ${name(element)}, ${style.color} on rgb(${back.map(Math.round)})`);
        }
      }
      for (const image of document.querySelectorAll("img")) {
        if (!image.naturalWidth || !seen(image)) continue;
        const page = Object.assign(document.createElement("canvas"), {width: 200, height: 200}).getContext("2d");
        const back = behind(image, known);
        page.fillStyle = `rgb(${back.map(Math.round)})`;
        page.fillRect(0, 0, 200, 200);
        page.drawImage(image, 0, 0, 200, 200);
        const dots = page.getImageData(0, 0, 200, 200).data, ground = luminance(...dots.slice(0, 3));
        let least = ground, greatest = ground;
        for (let i = 0; i < dots.length; i += 4) {
          const here = luminance(dots[i], dots[i + 1], dots[i + 2]);
          if (here < least) least = here;
          if (here > greatest) greatest = here;
        }
        const most = Math.max(contrast(least, ground), contrast(greatest, ground));
        if (!(most >= LEAST_LARGE)) faults.set(image, `a figure does not stand out, contrast ${most.toFixed(1)}: ${name(image)}`);
      }
      still.remove();
      return [...faults.values()].slice(0, SHOWN);
    },

    async found() {
      for (let i = 0; i < 100; i++) {
        if (document.querySelector("#search-results li a[href]")) return true;
        await new Promise((done) => setTimeout(done, 50));
      }
      return false;
    },
  };
})();
null;
