// What the scripts of the page know of each other and of the data; for the type checker alone.

declare const Plot: any;
declare const d3: any;

type Unit = "share" | "cosine" | "norm" | "count" | "bytes" | "seconds" | "text";
type Value = number | string | null;
/** Subject (a model, a pair) x place (a layer, a cell …). */
type Figures = { [measure: string]: (number | null)[][] };
type Places = "total" | "components" | "layers" | "cells" | "tensors";
type Scoped = { [place in Places]?: Figures };

interface Model {
  label: string;
  reference: string;
  tensors: number;
  parameters: number;
  bytes: number;
  dtypes: { dtype: string; tensors: number; entries: number; nbytes: number }[];
  modelType: string;
  architectures: string[];
  layers: number;
  tied: boolean;
  embeddingRows: number | null;
  vocabulary: { size: number; fingerprint: string } | null;
  computed: boolean;
}
interface Layer {
  key: string;
  where: "before" | "layer" | "after";
  stack: string;
  index: number | null;
}
interface Figure {
  name: string;
  value: number | null;
  unit: string;
}
interface Finding {
  code: string;
  level: "good" | "note" | "warning" | "error";
  title: string;
  text: string;
  figures: Figure[];
  models: string[];
  scope: { layer: string | null; component: string | null; tensor: string | null };
  action: string;
}
interface Subspace {
  tensor: string;
  pair: number;
  rank: number;
  left: number;
  right: number;
  chanceLeft: number;
  chanceRight: number;
}
interface Spectrum {
  tensor: string;
  layer: number | null;
  component: number | null;
  model: number;
  shape: number[];
  norm: number;
  indices: number[];
  values: number[];
  effectiveRank: number | null;
  stableRank: number;
  ranks: (number | null)[];
  energies: number[];
  computed: number;
  exact: boolean;
}
interface Histogram {
  component: number | null;
  model: number;
  entries: number;
  weight: number;
  zero: number;
  edges: number[];
  positive: number[];
  negative: number[];
  mean: number;
  deviation: number;
  kurtosis: number | null;
  quantiles: number[];
  tops: number[];
}
interface Data {
  kind: "models" | "recipe" | "merged";
  version: string;
  exact: boolean;
  baseNamed: boolean;
  models: Model[];
  inputs: number[];
  result: number | null;
  changed: number[];
  pairs: number[][];
  tops: number[];
  layers: Layer[];
  components: string[];
  cells: number[][];
  changes: Scoped;
  agreements: Scoped;
  conflicts: Scoped;
  overlaps: Scoped;
  composition: Scoped;
  explained: Scoped;
  subspaces: Subspace[];
  spectra: Spectrum[];
  histograms: Histogram[];
  health: {
    nonfinite: { model: string; tensor: string; entries: number; nan: number; infinite: number }[];
    rows: {
      model: string;
      tensor: string;
      rows: number;
      dead: number;
      first_dead: number[];
      duplicated: number;
      first_duplicated: number[][];
      new_dead: number;
    }[];
    differences: { model: string; tensor: string; kind: string; base: string; found: string }[];
    tokens: { model: string; added: number; removed: number; moved: number; examples: string[] }[];
  };
  recipe: null | {
    text: string;
    method: string;
    inputs: { model: string; parameters: { [name: string]: string } }[];
    parameters: { [name: string]: string };
    steps: string[];
    dtype: string;
  };
  merged: null | {
    path: string;
    version: string;
    arithmetic: string;
    written: string;
    files: { [name: string]: number };
    inputs: { path: string; nbytes: number; state: string }[];
    run: null | {
      seconds: number;
      bytes_read: number;
      bytes_written: number;
      threads: number;
      tensors: number;
      resumed: number;
    };
  };
  sampling: { statistic: string; rule: string; looked_at: number; of: number; unit: string }[];
  timings: { stage: string; seconds: number; nbytes: number }[];
  notes: string[];
  baseTests: { model: string; shares: boolean | null; p: number | null; figures: Figure[] }[];
  findings: Finding[];
  advice: Finding[];
  tensors: {
    names: string[];
    layers: (number | null)[];
    components: (number | null)[];
    shapes: number[][];
    dtypeNames: string[];
    dtypes: number[][];
  };
  pairTensorsLeftOut: boolean;
}

/** A column of a table: what its cells are, given the number of a row. */
interface Column {
  label: string;
  unit?: Unit;
  get: (row: number) => Value;
  wide?: boolean;
}
interface Table {
  columns: Column[];
  length: number;
}
interface Option {
  value: string;
  label: string;
}
interface Control {
  key: string;
  label: string;
  kind: "choice" | "several" | "toggle";
  options?: Option[];
  value: string | string[] | boolean;
}
/** What a person chose: by the keys of controls. */
type State = { [key: string]: any };
/** A place of a plot that the pointer and the arrow keys reach. */
interface Point {
  x: number;
  y: number;
  width?: number;
  height?: number;
  /** Left and right stay in a series, up and down go between them. */
  series: string;
  said: string[];
}
interface Drawn {
  nodes: Element[];
  table: Table;
  about?: string;
}
interface Measure {
  key: string;
  label: string;
  unit: Unit;
  about: string;
  /** Two models that are more alike have less of it. */
  apart?: boolean;
  pivot?: number;
  most?: number;
}
interface Theme {
  dark: boolean;
  ink: string;
  quiet: string;
  grid: string;
  ground: string;
  series: string[];
  sequential: (t: number) => string;
  diverging: (t: number) => string;
}
interface Colours {
  type: string;
  domain: number[];
  pivot?: number;
  interpolate: (t: number) => string;
}
/** How heat maps stand: numbers of layers (null: as in the model), of components and of cells. */
interface Order {
  layers: number[] | null;
  components: number[];
  cells: number[];
}
/** A line, or the dots of one model or pair; `style` chooses colour, dash and symbol. */
interface Series {
  name: string;
  style: number;
  values: (number | null)[];
  chance?: boolean;
}
