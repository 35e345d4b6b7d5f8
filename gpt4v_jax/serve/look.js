// What an answer looked at: a picture under a map of attention, with a choice of token, layer and picture.

// Dark to bright, as the maps of the report: every step is lighter than the one before.
const RAMP = [[0, 0, 4], [66, 10, 104], [147, 38, 103], [221, 81, 58], [252, 165, 10], [252, 255, 164]];

const share = (part) => `${(100 * part).toFixed(part < 0.1 ? 1 : 0)}%`;
const total = (map) => map.flat().reduce((sum, weight) => sum + weight, 0);

let panels = 0; // names of radio buttons are the page's

export class Look {
  // article: what the panel belongs to; pictures: [{preview, name}]; ask: {token, picture} -> what POST /look answers;
  // why_not: why there is none, "" where there is.
  constructor(article, pictures, ask, why_not) {
    this.panel = document.getElementById("look").content.cloneNode(true).firstElementChild;
    this.panel.hidden = true;
    Object.assign(this, { pictures, ask, why_not, layer: 0, number: ++panels });
    Object.assign(this, { answers: new Map(), wanted: { token: 0, picture: 0 } });
    article.append(this.panel);
  }

  find(what) { return this.panel.querySelector(what); }

  toggle() {
    this.panel.hidden = !this.panel.hidden;
    if (!this.panel.hidden) {
      if (this.why_not) this.wait(this.why_not);
      else this.update();
      this.panel.scrollIntoView({ block: "nearest" });
    }
    return !this.panel.hidden;
  }

  wait(message) {
    this.find(".wait").textContent = message;
    this.find(".wait").hidden = !message;
  }

  // Shows what is wanted. While one answer is on its way only the last wish counts.
  async update() {
    if (this.busy) return;
    this.busy = true;
    try {
      for (let shown = ""; shown !== this.key();) {
        shown = this.key();
        if (!this.answers.has(shown)) {
          this.wait(this.found ? "" : "Looking …");
          this.panel.setAttribute("aria-busy", "true");
          this.answers.set(shown, await this.ask({ ...this.wanted }));
        }
        if (shown === this.key()) this.show(this.answers.get(shown));
      }
    } catch (error) {
      this.wait(error.message);
    }
    this.panel.setAttribute("aria-busy", "false");
    this.busy = false;
  }

  key() { return `${this.wanted.token} ${this.wanted.picture}`; }

  show(found) {
    const first = !this.found;
    this.found = found;
    this.wait("");
    this.find(".found").hidden = false;
    if (first) this.choices();
    this.draw();
    if (first) this.panel.scrollIntoView({ block: "nearest" });
  }

  choices() {
    const { tokens, layers } = this.found;
    const visible = (token) => token.replaceAll("\n", "↵").replace(/^ +$/, (blanks) => "␣".repeat(blanks.length))
      || "·";
    this.chips("tokens", tokens.map(visible), (token) => { this.wanted.token = token; this.update(); });
    const names = ["mean", ...Array.from({ length: layers }, (_, layer) => String(layer + 1))];
    this.chips("layers", names, (layer) => { this.layer = layer; this.draw(); });
    this.find(".pictures").hidden = this.pictures.length < 2;
    this.chips("pictures", this.pictures.map(({ preview, name }) => {
      return Object.assign(new Image(), { src: preview, alt: name });
    }), (picture) => { this.wanted.picture = picture; this.update(); });
  }

  // A radio button for each label: one stop of the Tab key, arrow keys go from one to the next.
  chips(name, labels, choose) {
    this.find(`.${name} div`).replaceChildren(...labels.map((label, i) => {
      const [chip, input, shown] = ["label", "input", "span"].map((tag) => document.createElement(tag));
      Object.assign(input, { type: "radio", name: `${name}-${this.number}`, checked: !i, onchange: () => choose(i) });
      shown.append(label);
      chip.className = "chip";
      chip.append(input, shown);
      return chip;
    }));
  }

  draw() {
    const { maps, rows, columns, covered, resize, tokens, token, picture } = this.found;
    const mean = maps[0].map((row, r) =>
      row.map((_, c) => maps.reduce((sum, map) => sum + map[r][c], 0) / maps.length));
    const map = this.layer ? maps[this.layer - 1] : mean, most = Math.max(...map.flat());
    const [frame, image, canvas] = [".frame", ".frame img", "canvas"].map((what) => this.find(what));
    Object.assign(image, { src: this.pictures[picture].preview, alt: this.pictures[picture].name });
    frame.className = `frame ${resize}`;
    Object.assign(canvas, { width: columns, height: rows });
    Object.assign(canvas.style, { height: `${100 * covered[0]}%`, width: `${100 * covered[1]}%` });
    const pixels = new ImageData(columns, rows);
    map.flat().forEach((weight, i) => pixels.data.set([...colour(most ? weight / most : 0), 255], 4 * i));
    canvas.getContext("2d").putImageData(pixels, 0, 0);
    const at = map.flat().indexOf(most), where = `row ${Math.floor(at / columns) + 1}, column ${(at % columns) + 1}`;
    const told = `${share(total(map))} of the attention is on the picture`
      + (most ? `, the most at ${where}: ${share(most)}.` : ".");
    canvas.setAttribute("aria-label", `Attention over ${rows} rows and ${columns} columns of patches. ${told}`);
    const layer = this.layer ? `layer ${this.layer} of ${maps.length}` : "mean of the layers";
    this.find("figcaption").textContent = `“${tokens[token].trim()}”, ${layer}: ${told}`;
  }
}

function colour(x) {
  const at = Math.min(x * (RAMP.length - 1), RAMP.length - 1.001), low = Math.floor(at);
  return RAMP[low].map((value, i) => Math.round(value + (at - low) * (RAMP[low + 1][i] - value)));
}
